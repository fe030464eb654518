"""Figures over a whole sample: how trust follows probability, and how much mass leaves the labels."""

import math
from typing import Any


BINS = 20


def summarise(examples: list[dict[str, Any]], methods: int) -> list[dict[str, Any]]:
    """For each method: mean trust by the label's probability, a histogram of `1 - Q(y)`, and means over all tokens."""
    label_probs = [row[0] for example in examples for row in example["p"]]
    nll = [value for example in examples for value in example["nll"]]
    edges = [number / BINS for number in range(BINS + 1)]
    found = []
    for number in range(methods):
        columns = {
            name: [value for example in examples for value in example["methods"][number][name]]
            for name in ("trust", "label_mass", "kl")
        }
        leaving = [1 - mass for mass in columns["label_mass"]]
        by_p = [[] for _ in range(BINS)]
        for p, trust in zip(label_probs, columns["trust"], strict=True):
            by_p[_bin(p)].append(trust)
        count = [0] * BINS
        for value in leaving:
            count[_bin(value)] += 1
        found.append(
            {
                "trust_by_p": {
                    "edges": edges,
                    "mean": [_mean(values) for values in by_p],
                    "count": [len(values) for values in by_p],
                },
                "mass_leaving": {"edges": edges, "count": count},
                "mean": {"nll": _mean(nll)} | {name: _mean(column) for name, column in columns.items()},
            }
        )
    return found


def _bin(value: float) -> int:
    """Values outside of [0, 1], as signed targets have them, count at the ends."""
    return min(BINS - 1, max(0, math.floor(value * BINS)))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.5g}") if known else None
