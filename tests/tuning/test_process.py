"""A training as a job: its status, ended early, and gone with its parent."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

from trl_qtarget.tuning.process import run_job


# As `trl_qtarget.cli.job` does: a child of its own, and both end when the pipe closes.
JOB = """
import os, subprocess, sys, threading, time
from trl_qtarget.cli.supervise import watch_parent
watch_parent(int(sys.argv[-1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(float(sys.argv[1]))
child.kill()
sys.exit(int(sys.argv[2]))
"""


def command(seconds: float, status: int = 0) -> list[str]:
    return [sys.executable, "-c", JOB, str(seconds), str(status)]


def pids(log: Path) -> list[int]:
    return [int(each) for each in log.read_text().split()] if log.is_file() else []


def test_status_and_early_end(tmp_path):
    assert run_job(command(0, 3), tmp_path / "three", lambda: False) == 3
    log = tmp_path / "early"
    assert run_job(command(60), log, lambda: len(pids(log)) == 2) == 0
    assert len(pids(log)) == 2 and not any(map(psutil.pid_exists, pids(log)))


def test_nothing_outlives_a_killed_worker(tmp_path):
    log = tmp_path / "log"
    code = f"""
from pathlib import Path
from trl_qtarget.tuning.process import run_job
run_job({command(60)!r}, Path({str(log)!r}), lambda: False)
"""
    worker = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while len(pids(log)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    worker.kill()
    worker.wait()
    assert len(pids(log)) == 2
    while any(map(psutil.pid_exists, pids(log))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids(log)))
