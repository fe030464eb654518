"""A run killed between or during checkpoints goes on from the last whole one as if nothing had happened."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from cells import Cell, Result
from interrupted import MOMENTS, Interruption
from launch import finish, launcher, start, variables_of
from training import worst


SCRIPT = str(Path(__file__).parents[1] / "support" / "interrupted.py")
# AdamW has a state that has to come back; the lagged prior of these runs has moved when they are killed.
_OPTIONS = {"optim": "adamw_torch", "learning_rate": 0.02, "adam_epsilon": 1e-3}
PRIORS = {
    "policy": Cell("target_sft", "policy", options=_OPTIONS),
    "base_lora": Cell("asft", "base", True, _OPTIONS),
    "base": Cell("asft", "base", options=_OPTIONS),
    "model": Cell("asft", "model", options=_OPTIONS),
    "lagged": Cell("psft", "lagged", options=_OPTIONS),
    "lagged_lora": Cell("psft", "lagged", True, _OPTIONS),
}
_QUICK = [("lagged", "optimizer")]
_SLOW = [(prior, moment) for prior in PRIORS for moment in MOMENTS if (prior, moment) not in _QUICK]

# The same operations on the same numbers; checkpoints hold float32.
TOLERANCE = 1e-6


def run_all(runs: list[Interruption], folder: Path, command: list[str], backend: str = "") -> None:
    file, log = folder / "runs.json", folder / "log.txt"
    file.write_text(json.dumps([asdict(run) for run in runs]))
    finish(start([*command, SCRIPT, str(file), backend], log, **variables_of(backend)), log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


def runs_of(cases: list[tuple[str, str]], folder: Path) -> list[Interruption]:
    runs = [Interruption(PRIORS[prior], str(folder / prior)) for prior in dict.fromkeys(prior for prior, _ in cases)]
    for prior, moment in cases:
        killed = Interruption(PRIORS[prior], str(folder / f"{prior}-{moment}"), moment)
        runs += [killed, Interruption(killed.cell, killed.folder, resume=True)]
    return runs


def check(folder: Path, prior: str, moment: str) -> None:
    whole, resumed = (Result.load(folder / name / "result") for name in (prior, f"{prior}-{moment}"))
    assert (whole.facts["from_step"], resumed.facts["from_step"]) == (0, 2)
    assert len(resumed.logs) == len(whole.logs) == 6
    for line, expected in zip(resumed.logs, whole.logs, strict=True):
        assert line == pytest.approx(expected, rel=TOLERANCE)
    assert worst(resumed.weights, whole.weights) < TOLERANCE
    if moment != "between":  # what was killed had begun a checkpoint, which is not taken for a whole one
        assert (folder / f"{prior}-{moment}" / "checkpoint-4").is_dir()


@pytest.fixture(scope="module")
def quick(folder):
    (folder / "quick").mkdir()
    run_all(runs_of(_QUICK, folder / "quick"), folder / "quick", [sys.executable])
    return folder / "quick"


@pytest.fixture(scope="module")
def slow(folder):
    (folder / "slow").mkdir()
    run_all(runs_of(_SLOW, folder / "slow"), folder / "slow", [sys.executable])
    return folder / "slow"


@pytest.mark.parametrize(("prior", "moment"), _QUICK)
def test_killed_run_resumes(prior, moment, quick):
    check(quick, prior, moment)


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "moment"), _SLOW)
def test_killed_run_resumes_slow(prior, moment, slow):
    check(slow, prior, moment)


_SHARDED = [("lagged", "state"), ("lagged_lora", "weights"), ("base", "optimizer")]


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["zero3", "fsdp2", "sp2-zero3"])
@pytest.mark.parametrize(("prior", "moment"), _SHARDED)
def test_killed_run_resumes_sharded(prior, moment, backend, tmp_path):
    for run in runs_of([(prior, moment)], tmp_path):
        command = launcher("zero3-partitioned" if backend == "zero3" else backend, tmp_path)
        run_all([run], tmp_path, command, backend)
    check(tmp_path, prior, moment)
