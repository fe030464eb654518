"""A job in a process group of its own: a signal to this process ends all of the job, and nothing outlives it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil


# What ends a process by default and may be meant for all of a job. Windows has no SIGHUP.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Seconds in which a killed process is gone, unless a driver or a file system holds it.
_KILLING = 10


class Supervisor:
    """Runs one job, passes on what ends it, and waits until all of it is gone.

    The first signal goes to the whole group, which then has the time it needs: a training may be writing a checkpoint.
    A SIGINT after that, the second Ctrl-C, kills. Output is the job's own, unbuffered by this process.
    """

    def __init__(self):
        self._job: subprocess.Popen | None = None
        self._received: list[int] = []
        self._to_pass_on: list[int] = []
        self._seen: dict[int, psutil.Process] = {}
        self._killed = False

    def run(self, command: Sequence[str]) -> int:
        """Run a command that calls `watch_parent` with its last argument.

        Returns:
            Its exit status; 128 + n where signal n has ended the job, or this process was told to.
        """
        # Who ignores a signal, as under nohup, goes on ignoring it.
        former = {number: signal.getsignal(number) for number in _ENDING}
        handled = [number for number in _ENDING if former[number] != signal.SIG_IGN]
        for number in handled:
            signal.signal(number, self._on_signal)
        # The job holds one end of a pipe and sees it close if this process dies without a chance to say so.
        theirs, ours = os.pipe()
        try:
            self._job = subprocess.Popen([*command, str(theirs)], start_new_session=True, pass_fds=[theirs])
            os.close(theirs)
            self._pass_on()  # what came before there was a job
            status = self._job.wait()
            if self._received or status < 0:
                self._end_the_rest()
        finally:
            os.close(ours)
            for number in handled:
                signal.signal(number, former[number])
        return 128 + self._received[0] if self._received else exit_status(status)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) == 1:
            self._to_pass_on.append(number)
            self._pass_on()
        elif number == signal.SIGINT and self._job is not None:
            self._kill()

    def _pass_on(self) -> None:
        if self._job is not None and self._to_pass_on:
            self._signal(self._to_pass_on.pop())

    def _signal(self, number: int) -> None:
        self._look()
        with suppress(ProcessLookupError):
            os.killpg(self._job.pid, number)

    def _look(self) -> list[psutil.Process]:
        """All of the job that still runs: the group, and children of what belonged to the job when it was last seen.

        Workers of `torchrun` lead groups of their own.
        """
        others = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid not in self._seen:
                    others.append((process, process.ppid(), os.getpgid(process.pid)))
        found = [process for process, _, group in others if group == self._job.pid]
        while found:
            self._seen.update({process.pid: process for process in found})
            found = [
                process
                for process, parent, _ in others
                if process.pid not in self._seen and parent in self._seen and _runs(self._seen[parent])
            ]
        return [process for process in self._seen.values() if _runs(process)]

    def _end_the_rest(self) -> None:
        """Wait for what is left when the leader of the group is gone; ask it to end where nobody has."""
        for process in self._look():
            with suppress(psutil.Error, OSError):
                if not self._received or os.getpgid(process.pid) != self._job.pid:
                    process.terminate()
        while self._look() and not self._killed:
            time.sleep(0.2)

    def _kill(self) -> None:
        deadline = time.monotonic() + _KILLING
        while (left := self._look()) and time.monotonic() < deadline:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        self._killed = True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def exit_status(returncode: int) -> int:
    """What a shell says of a return code of `subprocess`, which is -n for a process that signal n has ended."""
    return 128 - returncode if returncode < 0 else returncode


def watch_parent(pipe: int) -> None:
    """In the job: end its process group when the supervisor, which holds the other end of the pipe, is gone."""

    def watch() -> None:
        os.read(pipe, 1)  # nothing is ever written
        os.killpg(os.getpgrp(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run(command: Sequence[str]) -> int:
    """Run a command under a `Supervisor`; where there are no process groups, on Windows, as it is."""
    if sys.platform == "win32":
        return exit_status(subprocess.call([*command, "-1"]))
    return Supervisor().run(command)
