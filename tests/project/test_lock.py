"""One run in a folder at a time, by real processes: others are refused on every rank, and the dead hold nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from launch import end, environment, finish, start, torchrun

from trl_qtarget import one_run_in


RUN = """
import sys, time
from accelerate import PartialState
from trl_qtarget import one_run_in
state = PartialState(cpu=True)
folder, wait, seconds = sys.argv[1:]
try:
    with one_run_in(folder, wait=float(wait)):
        print(f"rank {state.process_index} runs", flush=True)
        time.sleep(float(seconds))
except ValueError as error:
    print(f"rank {state.process_index} is refused: {error}", flush=True)
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "run.py").write_text(RUN)
    return str(tmp_path / "run.py")


@pytest.fixture
def other(script, tmp_path):
    """Another run, which holds the folder `out`."""
    command = [sys.executable, script, str(tmp_path / "out"), "0", "600"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "rank 0 runs\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_is_refused_until_the_first_is_dead(other, tmp_path):
    PartialState(cpu=True)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"`output_dir`: another run is writing into .*out\. Let it end, or choose"):
        with one_run_in(out, wait=0):
            pass
    with one_run_in(tmp_path / "elsewhere", wait=0):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    for _ in range(2):  # and it is given back each time
        with one_run_in(out, wait=0):
            pass
    assert all(name.startswith("_") for name in os.listdir(out)), "`Trainer` leaves these out when it pushes a folder"


def test_it_waits_for_a_run_that_is_just_ending(script, tmp_path):
    PartialState(cpu=True)
    command = [sys.executable, script, str(tmp_path / "out"), "0", "2"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "rank 0 runs\n"
        begun = time.monotonic()
        with one_run_in(tmp_path / "out"):
            assert time.monotonic() - begun > 1


def test_error_in_the_run_gives_the_folder_back(tmp_path):
    PartialState(cpu=True)
    with pytest.raises(KeyError), one_run_in(tmp_path, wait=0):
        raise KeyError
    with one_run_in(tmp_path, wait=0):
        pass


def two_ranks(script: str, folder: Path, log: Path) -> list[str]:
    begun = time.monotonic()
    finish(start([*torchrun(2), script, str(folder), "0", "0"], log), log, timeout=200)
    assert time.monotonic() - begun < 200
    return sorted(line for line in log.read_text().splitlines() if line.startswith("rank"))


@pytest.mark.distributed
def test_refusal_reaches_every_rank(other, script, tmp_path):
    lines = two_ranks(script, tmp_path / "out", tmp_path / "log.txt")
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} is refused: `output_dir`: another run is writing into {tmp_path}/out.")


def test_folder_that_cannot_be_made_is_told_to_every_rank(script, tmp_path):
    (tmp_path / "file").write_text("")
    lines = two_ranks(script, tmp_path / "file", tmp_path / "log.txt")
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} is refused: `output_dir`: {tmp_path}/file cannot be made (")


@pytest.mark.distributed
def test_ranks_of_one_job_share_the_folder(script, tmp_path):
    assert two_ranks(script, tmp_path / "out", tmp_path / "log.txt") == ["rank 0 runs", "rank 1 runs"]


def test_file_system_without_locks(tmp_path, monkeypatch, logged):
    """The run goes on, and says what is not noticed there."""
    PartialState(cpu=True)

    def acquire(self, *arguments, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with one_run_in(tmp_path):
        pass
    assert any("cannot be locked" in message and "would not be noticed" in message for message in logged())


@pytest.mark.slow
def test_job_of_the_command_line_holds_its_folder(other, tmp_path):
    """Nothing is loaded, and nothing in the folder touched."""
    before = sorted(os.listdir(tmp_path / "out"))
    command = [sys.executable, "-m", "trl_qtarget.cli.sft", "--use_cpu", "--bf16", "False"]
    command += ["--model_name_or_path", "never", "--dataset_name", "loaded", "--output_dir", str(tmp_path / "out")]
    log = tmp_path / "log.txt"
    job = start(command, log)
    try:
        finish(job, log)
    finally:
        end(job)
    assert job.returncode == 2, log.read_text()
    assert log.read_text().splitlines()[-1].startswith("trl-qtarget sft: `output_dir`: another run is writing into")
    assert sorted(os.listdir(tmp_path / "out")) == before
