"""A supervised job, by real processes: signals to the supervisor alone end all of it, and nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import environment


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no process groups")

SUPERVISOR = """
import sys
from trl_qtarget.cli.supervise import run
sys.exit(run([sys.executable, "-u", "leader.py", *sys.argv[1:]]))
"""

# A launcher with a worker in its group, and one that leads a session of its own, as torchrun's do, with a child.
LEADER = """
import os, signal, subprocess, sys, time
from trl_qtarget.cli.supervise import watch_parent
kind, pipe = sys.argv[1:]
watch_parent(int(pipe))
if kind == "exits":
    print("done", flush=True)
    sys.exit(7)
if kind == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
worker = [sys.executable, "-u", "worker.py", kind]
own = subprocess.Popen([*worker, "own"], start_new_session=True)
def forward(number, frame):
    own.terminate()
    own.wait()
    sys.exit(3)
if kind != "crashes":
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
with_us = subprocess.Popen([*worker, "group"])
if kind == "crashes":
    own.terminate()
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
with_us.wait()
"""

WORKER = """
import os, signal, subprocess, sys, time
kind, place = sys.argv[1:]
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def save(number, frame):
    print(f"saving {signal.Signals(number).name}", flush=True)
    time.sleep(1.5)
    print("saved", flush=True)
    helper.kill()
    os._exit(0)
if kind == "saves" and place == "group":
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
elif kind == "ignores":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: print("ignored", flush=True))
elif place == "own":
    signal.signal(signal.SIGTERM, lambda *_: (helper.kill(), os._exit(1)))
print(f"{place} works", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.fixture
def started(tmp_path):
    """Starts a supervisor in an environment of its own; ends what a failed test leaves."""
    for name, text in {"supervisor": SUPERVISOR, "leader": LEADER, "worker": WORKER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    known: list[psutil.Process] = []

    def start(kind: str, lines: int = 2, ignored: signal.Signals | None = None) -> tuple:
        log = tmp_path / "log.txt"
        # In the background SIGINT may be ignored, and after `nohup` SIGHUP.
        own = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
        former = {number: signal.signal(number, handler) for number, handler in own.items()}
        formerly = signal.signal(ignored, signal.SIG_IGN) if ignored else None
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "supervisor.py", kind], cwd=tmp_path, stdout=output, stderr=output, env=environment()
            )
        if ignored:
            signal.signal(ignored, formerly)
        for number, handler in former.items():
            signal.signal(number, handler)
        known.append(psutil.Process(process.pid))
        wait_for(lambda: log.read_text().count("works") == lines or process.poll() is not None)
        known.extend(known[0].children(recursive=True) if process.poll() is None else [])
        return process, log, known[1:]

    yield start
    for process in known:
        if runs(process):
            process.kill()


def wait_for(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_ended(process: subprocess.Popen, children: list[psutil.Process], status: int) -> None:
    assert len(children) == 5, "leader, two workers, and the child of each"
    assert process.wait(60) == status
    assert [child for child in children if runs(child)] == []


def test_output_and_status_pass_through(started):
    process, log, _ = started("exits", lines=0)
    assert process.wait(60) == 7 and log.read_text() == "done\n"


def test_output_comes_while_the_job_runs(started):
    process, log, _ = started("works")
    assert process.poll() is None and sorted(log.read_text().splitlines()) == ["group works", "own works"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_all_of_the_job(started, number):
    process, _, children = started("works")
    process.send_signal(number)  # of SIGHUP the leader dies without a word to its own worker
    check_ended(process, children, 128 + number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_job_has_the_time_it_needs(started, number):
    process, log, children = started("saves")
    process.send_signal(number)
    check_ended(process, children, 128 + number)
    lines = log.read_text().splitlines()
    assert f"saving {number.name}" in lines and "saved" in lines


def test_second_interrupt_kills(started):
    process, log, children = started("ignores")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "ignored" in log.read_text())
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    # One of them knows no better than to end.
    assert process.poll() is None and sum(map(runs, children)) == 4, "only an interrupt is a second Ctrl-C"
    process.send_signal(signal.SIGINT)
    check_ended(process, children, 128 + signal.SIGINT)


def test_job_ends_with_its_supervisor(started):
    """Killed without a word, as `subprocess.run(..., timeout=...)` does it."""
    process, _, children = started("works")
    process.kill()
    wait_for(lambda: not any(map(runs, children)))


def test_job_whose_leader_is_killed_ends(started):
    process, _, children = started("crashes")
    assert process.wait(60) == 128 + signal.SIGKILL
    assert [child for child in children if runs(child)] == []


def test_status_of_a_killed_job(started):
    process, *_ = started("dies", lines=0)
    assert process.wait(60) == 128 + signal.SIGKILL


def test_ignored_signal_stays_ignored(started):
    """As under nohup."""
    process, _, children = started("works", ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None and sum(map(runs, children)) == 5
    process.send_signal(signal.SIGTERM)
    check_ended(process, children, 128 + signal.SIGTERM)


@pytest.mark.parametrize("delay", [0, 0.02, 0.1, 0.3])
def test_signal_at_any_moment_of_the_start(started, delay, tmp_path):
    process, *_ = started("works", lines=0)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    group = Path(tmp_path).name  # nothing of this test's folder may be left

    def left() -> list:
        found = []
        for each in psutil.process_iter():
            try:
                if each.cwd() and group in each.cwd() and each.pid != os.getpid() and runs(each):
                    found.append(each)
            except psutil.Error:
                continue
        return found

    wait_for(lambda: not left())
