"""A time budget: how long a benchmark may go on measuring."""

import math
import time
from collections.abc import Iterator


class Budget:
    """Wall-clock seconds from now on, shared equally by a number of groups of measurements; None: no limit."""

    def __init__(self, seconds: float | None, groups: int = 1):
        self._end = math.inf if seconds is None else time.perf_counter() + seconds
        self._groups = groups
        self._last_begin: float | None = None
        self._longest = 0.0

    @property
    def left(self) -> float:
        """Seconds that are left, not below 0."""
        return max(0.0, self._end - time.perf_counter())

    def share(self, group: object) -> float:
        """Seconds for the next group: an equal share of what is left. At 0 the group should not begin; it is named."""
        share = self.left / max(1, self._groups)
        self._groups -= 1
        if share == 0:
            _leave_out(group)
        return share

    def begins(self, group: object) -> bool:
        """Whether a group that takes as long as it takes should begin: if the longest so far would still end in time.

        It is called when the one before has ended. A group that should not begin is named.
        """
        now = time.perf_counter()
        if self._last_begin is not None:
            self._longest = max(self._longest, now - self._last_begin)
        self._last_begin = now
        fits = self.left > self._longest
        if not fits:
            _leave_out(group)
        return fits


def _leave_out(group: object) -> None:
    print(f"\n{group} is left out: the time budget is spent.", flush=True)


def rounds(least: int, most: int, seconds: float) -> Iterator[int]:
    """Count rounds from 0: at least `least`, at most `most`, and none that would probably end after `seconds`."""
    start = begun = time.perf_counter()
    last = 0.0
    for number in range(most):
        if number >= least and begun - start + last > seconds:
            return
        yield number
        now = time.perf_counter()
        last, begun = now - begun, now
