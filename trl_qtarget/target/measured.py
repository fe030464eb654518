"""Knobs that the data decides: `"auto"` is measured once, before the first step of a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass


# What a configuration says in the place of a number that is to be measured.
AUTO = "auto"


@dataclass(frozen=True)
class Knowledge:
    """What the policy knows of its training data before it is trained.

    Attributes:
        quartile: the mean NLL per label, in nats, that a quarter of the sequences stay below.
        sequences: how many were measured.
    """

    quartile: float
    sequences: int


@dataclass(frozen=True)
class Measured:
    """In the annotation of a knob: the knob may be `"auto"`, and `value` is what it then becomes."""

    value: Callable[[Knowledge], float]


def exponent(knowledge: Knowledge) -> float:
    """exp(-3 q): near 1 where the policy knows the best quarter of the data, near 0 where it knows none of it.

    What a policy finds improbable is suspicious where it knows much of the data, and what there is to learn where it
    knows nothing. A mean does not tell the two apart: flawed labels raise it as unknown ones do.
    """
    return math.exp(-3 * knowledge.quartile)
