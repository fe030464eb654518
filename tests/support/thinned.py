"""Cases of which `make test` runs some and `make test-slow` the others."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from formulas import OF_2026


# Of the rows of 2026, one for each statistic that the kernels gather for it alone, and one of parts.
_FOLDED_ANEW = ("rank_tuner", "trim_sft", "deft", "prift_mass", "otr")


def thinned(cases: Iterable[Any], kept: Callable[..., bool]) -> list[Any]:
    """The cases for `parametrize`; those that `kept` does not take are marked slow. A tuple is one of many values."""
    given = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if kept(*case) else pytest.mark.slow) for case in given]


def by_kernels(name: str, *others: Any) -> bool:
    """Whether a method's kernels do what those of no other do; the rest of the methods is for `make test-slow`."""
    return name not in OF_2026 or name in _FOLDED_ANEW


# One for every way in which statistics are folded and gradients made.
_WAYS = ("sft", "eaft", "iw_sft", "label_smoothing", "asft", "gem", "target_sft", "otr", "prift_mass", "trim_sft")


def by_ways(name: str, *others: Any) -> bool:
    """Whether a method is the one that stands for all whose numbers are made in its way."""
    return name in _WAYS


def one_of_each(cases: Iterable[tuple[Any, Any]]) -> set[tuple[Any, Any]]:
    """Of all pairs of two lists so few that every value of either is in one of them."""
    firsts, seconds = (list(dict.fromkeys(values)) for values in zip(*cases, strict=True))
    longest = max(len(firsts), len(seconds))
    return {(firsts[i % len(firsts)], seconds[i % len(seconds)]) for i in range(longest)}
