"""The benchmarks run, at toy sizes: every provider computes what its objective says, and rows reach their files."""

import importlib.util

import pytest
import torch

from benchmarks import head, memory, peers, providers, report, statistics_cost
from benchmarks.common import read_results
from benchmarks.inputs import Shape, make_inputs
from trl_qtarget.chunks import Batch
from trl_qtarget.trainer import QTargetSFTTrainer


SHAPE = Shape(24, 32, 300)


def rows_of(path):
    return {(row["provider"], row["mode"]): row for row in read_results(path)}


def test_head_writes_rows_of_all_that_can_run(tmp_path):
    output = tmp_path / "head.csv"
    options = ["--repeats", "1", "--device", "cpu", "--output", str(output)]
    head.main(["--shapes", str(SHAPE), "--providers", "qtarget", "trl", "dense", *options])
    rows = rows_of(output)
    groups = ("qtarget", "trl", "dense")
    expected = {name for name in providers.PROVIDERS if name.split("/")[0] in groups}
    expected |= {"floor/own", "floor/reference"}
    assert set(rows) == {(name, mode) for name in expected for mode in ("trainable", "frozen")}
    assert all(float(row["median"]) > 0 for row in rows.values())
    assert rows["trl/dft", "frozen"]["trl_ratio"] == "" and float(rows["qtarget/dft", "frozen"]["trl_ratio"]) > 0
    assert "qtarget/target_sft" in report.table(read_results(output))


def test_memory_writes_rows(tmp_path):
    output = tmp_path / "memory.csv"
    options = ["--repeats", "1", "--device", "cpu", "--output", str(output)]
    memory.main(["--shapes", "512x8x20000", "--providers", "qtarget/dft", *options])
    assert set(rows_of(output)) == {("qtarget/dft", "trainable"), ("floor/returned", "trainable")}


def test_cost_of_statistics_is_measured_and_leaves_the_trainer_whole(tmp_path):
    whole = Batch._record, QTargetSFTTrainer._record
    output = tmp_path / "statistics.csv"
    options = ["--model", "tiny", "--tokens", "16", "--repeats", "2", "--device", "cpu", "--output", str(output)]
    statistics_cost.main(options)
    assert (Batch._record, QTargetSFTTrainer._record) == whole
    rows = rows_of(output)
    for mode, name in statistics_cost.CASES:
        assert float(rows[name, mode]["floor_ratio"]) > 0
        assert (f"{name} without statistics", mode) in rows


def test_peers_of_one_objective_agree(monkeypatch):
    # Liger's kernels run in Triton's interpreter too; what is compiled takes longer than it is worth here.
    monkeypatch.setattr(peers, "missing", lambda package, device: None)
    names = [name for name, each in providers.PROVIDERS.items() if name.split("/")[0] in ("qtarget", "trl", "dense")]
    if importlib.util.find_spec("liger_kernel") is not None and not torch.cuda.is_available():
        names += ["liger/nll", "liger/dft", "liger/forward_kl"]
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    providers.check_agreement(names, inputs)
    providers.check_agreement(names, inputs.frozen())
    with pytest.raises(RuntimeError, match="disagree"):
        broken = providers.replace(providers.PROVIDERS["dense/nll"], loss=lambda given: 1.01 * peers.dense_nll(given))
        monkeypatch.setitem(providers.PROVIDERS, "dense/nll", broken)
        providers.check_agreement(["trl/nll", "dense/nll"], inputs)


def test_what_cannot_run_is_left_out_and_said(capsys):
    found = providers.available(providers.PROVIDERS, None, "cpu")
    assert {name.split("/")[0] for name in found} == {"qtarget", "trl", "dense", "compile"}
    printed = capsys.readouterr().out
    assert "liger/nll is left out: " in printed and "cce/nll is left out: " in printed
    with pytest.raises(SystemExit, match="qtarget-torch/dft: on a CPU it is what `qtarget` is"):
        providers.available(["qtarget-torch/dft"], ["qtarget-torch/dft"], "cpu")
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        assert peers.missing("cut_cross_entropy", "cuda") == "cut-cross-entropy is not installed"
