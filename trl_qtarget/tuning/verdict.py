"""The decision: whether a target beat plain SFT beyond chance. No model, no file, no Optuna: numbers alone.

Scores are arrays `[S, P]`: of each fresh training (a seed) on each prompt. Two things limit what a difference of means
says of other trainings and other prompts, and both are estimated:

- between trainings, from all configurations together, plain SFT twice among them: what is left of their means when
  each configuration's and each seed's own mean is taken away. A few seeds of one difference alone would often
  agree by chance;
- between prompts, from the differences averaged over the trainings.

The variance of a difference is the sum of both, less the part that is counted in both (the noise of a single answer).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from mpmath import betainc
from numpy.typing import ArrayLike, NDArray


# The chance to recommend something else than `sft` where nothing is better, over all candidates and looks.
LEVEL = 0.05
# The confirmation is looked at once, and where that leaves it open, once more with as many fresh seeds again.
LOOKS = 2


class Outcome(Enum):
    """What a look at the confirmation says of a candidate."""

    BETTER = "better beyond chance"
    OPEN = "open"
    NOT_BETTER = "not better beyond chance"


@dataclass(frozen=True)
class Difference:
    """A difference of two mean scores.

    Attributes:
        value: candidate minus `sft`, in the metric's unit, larger is better.
        error: its standard error.
        freedom: the degrees of freedom of the error.
    """

    value: float
    error: float
    freedom: float

    @property
    def p_value(self) -> float:
        """The chance of at least this difference where there is none (one-sided Student t)."""
        if self.error == 0:
            return 0.0 if self.value > 0 else 1.0
        t = self.value / self.error
        tail = 0.5 * float(betainc(self.freedom / 2, 0.5, 0, self.freedom / (self.freedom + t * t), regularized=True))
        return tail if t > 0 else 1 - tail


@dataclass(frozen=True)
class Judged:
    """A candidate, its difference to `sft`, and what follows."""

    name: str
    difference: Difference
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """What a confirmation says.

    Attributes:
        judged: the candidates, in the order of the search.
        control: the second `sft` against the first: what chance alone does. None if there is no second one.
        level: the level at which each candidate was tested.
    """

    judged: tuple[Judged, ...]
    control: Difference | None
    level: float

    @property
    def winner(self) -> Judged | None:
        """The candidate with the largest gain among those that beat `sft` beyond chance; None: keep `sft`."""
        better = [each for each in self.judged if each.outcome is Outcome.BETTER]
        return max(better, key=lambda each: each.difference.value, default=None)

    @property
    def open(self) -> bool:
        """Whether more seeds could change it."""
        return self.winner is None and any(each.outcome is Outcome.OPEN for each in self.judged)


def paired_difference(mine: ArrayLike, baseline: ArrayLike) -> tuple[float, float, float]:
    """The mean of differences prompt by prompt, and what it would vary by over other prompts.

    Args:
        mine, baseline: `[S, P]` scores of the same prompts.

    Returns:
        The mean; the squared standard error over prompts, each averaged over the trainings (0 for one prompt); the
        part of it that is the noise of single answers (0 for one training).
    """
    differences = np.asarray(mine, dtype=float) - np.asarray(baseline, dtype=float)
    seeds, prompts = differences.shape
    over_prompts = differences.mean(0).var(ddof=1) / prompts if prompts > 1 else 0.0
    noise = 0.0
    if seeds > 1 and prompts > 1:
        left = differences - differences.mean(0) - differences.mean(1, keepdims=True) + differences.mean()
        noise = (left**2).sum() / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
    return float(differences.mean()), float(over_prompts), float(noise)


def training_variance(scores: Sequence[NDArray[np.float64]]) -> tuple[float, int]:
    """How much the mean score of one training varies by its seed, over all configurations together.

    Args:
        scores: `[S, P]` of each of at least two configurations, S at least 2.

    Returns:
        The variance of one training's mean, and its degrees of freedom.
    """
    means = np.array([each.mean(1) for each in scores])
    left = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    freedom = (means.shape[0] - 1) * (means.shape[1] - 1)
    return float((left**2).sum() / freedom), freedom


def judge(
    candidates: Mapping[str, ArrayLike], sft: ArrayLike, sft_again: ArrayLike | None = None, last: bool = False
) -> Verdict:
    """Judge candidates by their confirmation.

    Args:
        candidates: `[S, P]` scores of each by name, in the order of the search.
        sft, sft_again: the scores of tuned `sft`, and of the same configuration with other seeds. Their mean is what
            candidates are compared with.
        last: whether no further seeds will follow: then nothing stays open.

    Raises:
        ValueError: the scores are not of the same seeds and prompts, there are fewer than two seeds, or one is NaN.
    """
    arrays = {name: np.asarray(scores, dtype=float) for name, scores in candidates.items()}
    baselines = [np.asarray(each, dtype=float) for each in (sft, sft_again) if each is not None]
    shape = baselines[0].shape
    if len(shape) != 2 or shape[0] < 2 or any(each.shape != shape for each in (*arrays.values(), *baselines)):
        raise ValueError(
            "`candidates` and `sft` must be scores [S, P] of the same prompts, with S >= 2 trainings each."
        )
    if not all(np.isfinite(each).all() for each in (*arrays.values(), *baselines)):
        raise ValueError("`candidates` or `sft` hold a score that is NaN or infinite: leave it out.")
    level = LEVEL / (LOOKS * max(1, len(arrays)))
    if not arrays:  # none has come through its trainings
        return Verdict((), None, level)
    variance, freedom = training_variance([*baselines, *arrays.values()])
    baseline = sum(baselines) / len(baselines)

    def compared(mine: NDArray[np.float64], other: NDArray[np.float64], others: int) -> Difference:
        value, over_prompts, noise = paired_difference(mine, other)
        over_trainings = variance * (1 + 1 / others) / shape[0]
        squared = max(over_prompts + over_trainings - noise, over_prompts, over_trainings)
        weights = over_trainings**2 / freedom
        weights += over_prompts**2 / (shape[1] - 1) if shape[1] > 1 else 0.0
        # Satterthwaite's, never more than the parts have together.
        degrees = (over_trainings + over_prompts) ** 2 / weights if weights > 0 else freedom
        return Difference(value, squared**0.5, min(degrees, freedom + shape[1] - 1))

    judged = []
    for name, scores in arrays.items():
        difference = compared(scores, baseline, len(baselines))
        if difference.p_value < level:
            outcome = Outcome.BETTER
        else:
            outcome = Outcome.NOT_BETTER if last or difference.value <= 0 else Outcome.OPEN
        judged.append(Judged(name, difference, outcome))
    control = compared(baselines[1], baselines[0], 1) if len(baselines) > 1 else None
    return Verdict(tuple(judged), control, level)
