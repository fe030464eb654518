"""A part of a benchmark, run as a process of its own that ends when its time is over."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
DONE, FAILED = "done", "failed"


def run_limited(command: Sequence[str], seconds: float, **options: Any) -> str:
    """Run a command from the top of the checkout and say how it ended.

    When its time is over it is stopped, with all its processes.

    Args:
        command: what to run.
        seconds: how long it may take.
        options: of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    try:
        return FAILED if process.wait(timeout=seconds) else DONE
    except subprocess.TimeoutExpired:
        return "stopped, its time was over"
    finally:
        _end(process)  # also when the caller is interrupted


def _end(process: subprocess.Popen) -> None:
    """End a part and the processes that it has started, if they still run; give it a moment to clean up."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
