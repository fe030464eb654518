"""The benchmarks run, at toy sizes: every provider computes what its objective says, and rows reach their files."""

import importlib
import importlib.util
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from thinned import thinned


pytest.importorskip("trl.kernels.chunked_divergence", reason="the benchmarks measure TRL's losses, which are newer")

from benchmarks import __main__ as command
from benchmarks import (
    budget,
    figures,
    head,
    memory,
    peers,
    providers,
    readme,
    report,
    statistics_cost,
    step,
    sweep,
    zeros,
)
from benchmarks.common import COLUMNS, RESULTS, read_results, write_results
from benchmarks.inputs import Shape, make_inputs
from benchmarks.parts import PARTS
from benchmarks.selection import BENCHMARKS, newest
from trl_qtarget.loss.chunks import Batch
from trl_qtarget.training.trainer import QTargetSFTTrainer


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


@pytest.mark.slow
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
        assert (f"{name}, in its statistics", mode) in rows


def test_savings_by_zeros_are_measured(tmp_path):
    output = tmp_path / "zeros.csv"
    zeros.main(["--shapes", str(SHAPE), "--repeats", "1", "--device", "cpu", "--output", str(output)])
    rows = read_results(output)
    assert {row["benchmark"] for row in rows} == {f"zeros {share:.0%}" for share in zeros.SHARES}
    assert all(float(row["floor_ratio"]) > 0 for row in rows if row["provider"].startswith("qtarget"))


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
    of_torch = {"torch"} if hasattr(torch.nn.functional, "linear_cross_entropy") else set()
    assert {name.split("/")[0] for name in found} == {"qtarget", "trl", "dense", "compile"} | of_torch
    printed = capsys.readouterr().out
    assert "liger/nll is left out: " in printed and "cce/nll is left out: " in printed
    with pytest.raises(SystemExit, match="qtarget-torch/dft: on a CPU it is what `qtarget` is"):
        providers.available(["qtarget-torch/dft"], ["qtarget-torch/dft"], "cpu")
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        assert peers.missing("cut_cross_entropy", "cuda") == "cut-cross-entropy is not installed"


def test_a_library_that_cannot_or_disagrees_is_left_out(monkeypatch, capsys):
    def fails(given):
        raise NotImplementedError("no such device")

    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    nll = providers.PROVIDERS["dense/nll"]
    monkeypatch.setitem(providers.PROVIDERS, "liger/nll", providers.replace(nll, loss=fails))
    wrong = providers.replace(nll, loss=lambda given: 1.01 * peers.dense_nll(given))
    monkeypatch.setitem(providers.PROVIDERS, "cce/nll", wrong)
    assert providers.check_agreement(["qtarget/sft", "liger/nll", "cce/nll"], inputs) == ["qtarget/sft"]
    printed = capsys.readouterr().out
    assert "liger/nll is left out at 24x32x300: NotImplementedError" in printed
    assert "cce/nll is left out: cce/nll and qtarget/sft disagree" in printed
    monkeypatch.setitem(providers.PROVIDERS, "qtarget/sft", providers.replace(nll, loss=fails))
    with pytest.raises(NotImplementedError):
        providers.check_agreement(["qtarget/sft"], inputs)


def test_sweep_varies_one_size_at_a_time(tmp_path, monkeypatch):
    # The processes that measure memory have a test of their own.
    peak = {"bytes": 1000, "source": "made up"}
    monkeypatch.setattr(sweep, "peaks", lambda name, shapes, *rest: dict.fromkeys(shapes, peak))
    output = tmp_path / "sweep-cpu.csv"
    sizes = "--base 64x16x200 --N 64 128 --V 200 400 --H 16 32 --dtypes bf16 --modes frozen".split()
    sweep.main([*sizes, "--providers", "qtarget/dft", "--repeats", "1", "--device", "cpu", "--output", str(output)])
    rows = [row for row in read_results(output) if row["provider"] == "qtarget/dft"]
    for metric in ("seconds", "bytes"):
        found = [(row["benchmark"], row["N"], row["H"], row["V"]) for row in rows if row["metric"] == metric]
        base = ("64", "16", "200")
        assert found == [
            *(("sweep N", *base), ("sweep N", "128", "16", "200")),
            *(("sweep V", *base), ("sweep V", "64", "16", "400")),
            *(("sweep H", *base), ("sweep H", "64", "32", "200")),
            ("sweep dtype", *base),
        ]
    assert {row["dtype"] for row in rows if row["benchmark"] == "sweep dtype"} == {"bf16"}
    assert "### Loss by H" in report.table([row for row in rows if row["benchmark"] == "sweep H"])


def test_sweep_on_a_cpu_begins_where_a_chunk_is_full():
    """Else memory would still grow with N and V, though no more than a chunk's worth."""
    grid = sweep.GRIDS["cpu"]
    assert min(point.shape.N * point.shape.V for point in sweep.points_of(grid, "fp32", ["fp32"])) >= 1 << 26


@pytest.mark.parametrize("mode", thinned(["full", "qlora"], lambda mode: mode == "full"))
def test_step_runs_trainers_with_a_reference_model(mode, tmp_path):
    if reason := step.missing(mode):
        pytest.skip(reason)
    output = tmp_path / "step.csv"
    names = ["qtarget/target_sft+reference", "trl/nll"]
    sizes = ["--model", "tiny", "--tokens", "16", "--steps", "2", "--repeats", "1", "--modes", mode]
    step.main([*sizes, "--providers", *names, "--device", "cpu", "--output", str(output)])
    rows = rows_of(output)
    assert set(rows) == {(name, mode) for name in names}
    assert float(rows[names[0], mode]["trl_ratio"]) > 0


def test_budget(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    shared = budget.Budget(10, groups=2)
    assert shared.share("first") == 5
    now = 4.0
    assert shared.share("second") == 6
    whole = budget.Budget(10)
    assert whole.begins("first")
    now = 10.0  # it took 6 seconds, and 4 are left
    assert not whole.begins("second") and shared.share("third") == 0
    assert capsys.readouterr().out.count("is left out: the time budget is spent.") == 2
    assert budget.Budget(None, 3).begins("anything")

    for seconds, expected in ((10.0, 3), (0.0, 2), (100.0, 9)):  # each of 3; a fourth would end after 12
        count = 0
        for _ in budget.rounds(2, 9, seconds):
            now, count = now + 3, count + 1
        assert count == expected


@pytest.mark.slow
def test_figures_are_made_from_rows_alone_and_equal_rows_give_equal_files(tmp_path, results_of_a_gpu):
    shutil.copytree(RESULTS, results_of_a_gpu, dirs_exist_ok=True)
    first, second = (figures.draw(results_of_a_gpu, tmp_path / name) for name in ("first", "second"))
    names = {path.name for path in first}
    assert {f"benchmark-{name}-cuda.svg" for name in ("head", "memory", "sweep", "step")} <= names
    assert {f"benchmark-{name}-cpu.svg" for name in ("head", "memory", "step")} <= names
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and b"<dc:date>" not in one.read_bytes()


@pytest.fixture
def results_of_a_gpu(tmp_path, monkeypatch):
    """A folder with rows as a GPU would leave them, made up."""
    shape = {"N": 8192, "H": 4096, "V": 151936, "dtype": "bf16"}
    numbers = {"min": 1.0, "max": 1.0, "repeats": 7}
    facts = dict.fromkeys(("torch", "trl", "transformers", "trl_qtarget"), "1.0")
    facts |= {"device": "cuda", "machine": "GPU", "threads": 8, "date": "2026-01-01"}
    monkeypatch.setattr("benchmarks.common.machine_facts", lambda device: facts)
    folder = tmp_path / "made up"

    def write(name, rows, **fixed):
        rows = [{"benchmark": name, **shape, **numbers, "median": 1.0, **fixed, **row} for row in rows]
        write_results(folder / f"{name.split()[0]}-cuda.csv", rows, "cuda")

    names = ("qtarget/dft", "qtarget/target_sft", "trl/dft", "liger/dft")
    ratios = {"floor_ratio": 1.25, "trl_ratio": 0.5}
    for mode in ("trainable", "frozen"):
        write("head", [{"provider": name, **ratios} for name in names], mode=mode, metric="seconds")
    sizes = {"qtarget/dft": 4.5e9, "trl/dft": 12e9, "floor/returned": 1.3e9}
    write(
        "memory",
        [{"provider": name, "median": size} for name, size in sizes.items()],
        mode="trainable",
        metric="bytes",
    )
    for tokens in (2048, 16384):
        returned = tokens * 4096 * 2.0
        for metric, size in (("seconds", tokens / 1e6), ("bytes", returned + 5e8)):
            rows = [{"provider": "qtarget/dft", "median": size}]
            rows += [{"provider": "floor/returned", "median": returned}] if metric == "bytes" else []
            write("sweep N", rows, mode="frozen", metric=metric, N=tokens)
    rows = [{"provider": f"qtarget/{name}", "trl_ratio": 0.9} for name in ("dft", "target_sft+reference")]
    write("step", rows, mode="lora", metric="seconds", N=8192, H=1024)
    return folder


def test_readme_says_what_the_rows_say(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_readme_of_a_gpu(results_of_a_gpu):
    text = " ".join(readme.section(results_of_a_gpu).split())
    assert "still to be measured" not in text and "on a CPU" not in text
    assert "on one GPU (bfloat16, medians of seven interleaved rounds; torch 1.0, trl 1.0;" in text
    assert "| 8192 × 4096 × 151936 | trained | 1.25 | 0.50 | 1.25 | 0.50 |" in text
    assert "÷ floor: Liger 1.25 (`dft`, 8192 × 4096 × 151936)." in text
    assert "returned gradients (1.3 GB) included, at N = 8192, V = 151,936, H = 4096" in text
    assert "4.5 GB for `dft` (TRL's 12 GB)." in text
    assert "From 2048 to 16384 tokens (V = 151,936, H = 4096, frozen head) the time of `dft` grows 8.0-fold" in text
    assert "goes from 0.5 to 0.5 GB" in text
    assert "of Qwen3-0.6B's sizes, 8192 tokens, medians of seven: `dft` takes 0.90 (LoRA) of the time" in text
    assert "`target_sft` with a reference model 0.90 (LoRA) of the time of TRL's `nll`." in text


def test_readme_without_rows_says_that_they_are_missing(tmp_path):
    text = readme.section(tmp_path)
    assert text.startswith("GPU figures are still to be measured: `python -m benchmarks`") and "floor" not in text
    with pytest.raises(ValueError, match="must have a section between"):
        readme.replaced("# A README without it", text)


def test_newest_rows_are_of_one_machine_and_one_set_of_versions(tmp_path):
    def row(machine, version, date, provider):
        row = dict.fromkeys(COLUMNS, "") | {"benchmark": "head", "metric": "seconds", "device": "cpu", "median": 1.0}
        return row | {"machine": machine, "torch": version, "date": date, "provider": provider}

    lines = [
        row("A", "2.8", "2026-01-01", "old"),
        row("A", "2.9", "2026-01-03", "new"),
        row("B", "2.9", "2026-01-02", ""),
    ]
    path = tmp_path / "head-cpu.csv"
    path.write_text("\n".join(",".join(map(str, line)) for line in (COLUMNS, *(each.values() for each in lines))))
    assert [each["provider"] for each in newest(tmp_path, "cpu")["head"]] == ["new"]
    assert newest(tmp_path, "cuda") == {}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_are_accepted_by_their_benchmarks_and_keep_to_their_budget(name, device, tmp_path, capsys):
    """Also the arguments for a GPU: without any time left, they are only read."""
    assert tuple(PARTS) == BENCHMARKS
    output = tmp_path / "rows.csv"
    module = importlib.import_module(f"benchmarks.{PARTS[name].module}")
    options = ["--device", "cpu", "--budget", "1e-9", "--output", str(output)]
    module.main([*PARTS[name].arguments(device, quick=False), *options])
    assert not read_results(output) and "is left out: the time budget is spent." in capsys.readouterr().out


@pytest.mark.slow
def test_command_leaves_rows_figures_and_text(tmp_path, capfd):
    assert command.main(["--quick", "--only", "head", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert ("qtarget/dft", "trainable") in rows_of(tmp_path / "head-cpu.csv")
    assert (tmp_path / "figures" / "benchmark-head-cpu.svg").is_file()
    assert "256 × 64 × 1000" in (tmp_path / "performance.md").read_text()
    printed = capfd.readouterr().out
    assert "[1/1] head: at most" in printed and "[1/1] head: done" in printed


def test_command_stops_a_part_whose_time_is_over(tmp_path, monkeypatch):
    started = []

    def endless(command, **options):
        started.append(subprocess_of([sys.executable, "-c", "while True: pass"], **options))
        return started[-1]

    subprocess_of = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", endless)
    monkeypatch.setattr(command, "_START", -10)  # else so short a time would not be begun
    options = ["--quick", "--only", "head", "--device", "cpu", "--minutes", str((command._REPORT + 1) / 60)]
    assert command.main([*options, "--output", str(tmp_path)]) == 0
    assert started[0].returncode in (-signal.SIGINT, -signal.SIGKILL)


@pytest.mark.slow
def test_command_runs_every_part(tmp_path):
    assert command.main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.csv")} == {f"{name}-cpu.csv" for name in PARTS}
