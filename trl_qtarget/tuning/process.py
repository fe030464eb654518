"""A training as a job of its own, which ends with this process, and early where no more of it is needed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


# Seconds that a job has to end in when it is asked to; `torchrun` gives its workers 30.
_GRACE = 45.0
_POLL = 0.5


def run_job(command: Sequence[str], log: Path, until: Callable[[], bool]) -> int:
    """Run a command until it ends, or a condition holds; whatever happens here, nothing of it outlives this call.

    Args:
        command: what ends when the file descriptor closes that its last argument, added here, names.
        log: gets what it writes, after what is there.
        until: when to end it early.

    Returns:
        Its exit status; 0 where it was ended early.
    """
    theirs, ours = os.pipe()
    job = None
    try:
        with log.open("ab") as output:
            windows = sys.platform == "win32"
            job = subprocess.Popen(
                [*command, "-1" if windows else str(theirs)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[] if windows else [theirs],
            )
        os.close(theirs)
        while (status := job.poll()) is None:
            if until():
                return 0
            time.sleep(_POLL)
        return 128 - status if status < 0 else status
    finally:
        if job is not None and job.poll() is None:
            _end(job)
        os.close(ours)


def _end(job: subprocess.Popen) -> None:
    processes = [psutil.Process(job.pid)]
    with suppress(psutil.Error):
        processes += processes[0].children(recursive=True)
    with suppress(ProcessLookupError, AttributeError):
        os.killpg(job.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=_GRACE)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    job.wait()
