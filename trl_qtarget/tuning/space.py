"""What is searched: for each method its knobs and the learning rate."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from ..target.config import QTargetConfig
from ..target.objective import knobs_of
from ..target.registry import Knob


RATE = "learning_rate"
# A learning rate is searched within this factor of the recipe's, a knob within this one of its default.
RATE_FACTOR, KNOB_FACTOR = 10.0, 4.0


@dataclass(frozen=True)
class Candidate:
    """A method (or free combination, or formula) with what is tuned of it.

    Attributes:
        name: as it was asked for: `asft`, or `asft:lam=0.03`, whose `lam` is then not tuned.
        config: the target; a knob that is None is tuned, unless the method measures it.
        rates: the lowest and the highest learning rate.
        start: the learning rate of the first trial, which has every knob at its default.
    """

    name: str
    config: QTargetConfig
    rates: tuple[float, float]
    start: float

    @cached_property
    def space(self) -> dict[str, BaseDistribution]:
        """Distributions by name: the learning rate, and the knobs that were left open."""
        low, high = self.rates
        space: dict[str, BaseDistribution] = {RATE: FloatDistribution(low, high, log=True)}
        known = knobs_of(self.config.row, self.config.designs)
        # One that is measured by default stays so.
        measured = self.config.open_knobs
        tuned = [name for name in known if getattr(self.config, name) is None and name not in measured]
        return space | {name: _around(known[name]) for name in tuned}

    @property
    def defaults(self) -> dict[str, float]:
        """The first trial: the learning rate of the recipe, the knobs of the publication."""
        low, high = self.rates
        knobs = {name: self.config.knobs[name] for name in self.space if name != RATE}
        return {RATE: min(max(self.start, low), high), **knobs}

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The parameters of a trial, drawn by the study's sampler."""
        return {
            name: (
                trial.suggest_int(name, each.low, each.high, log=each.log)
                if isinstance(each, IntDistribution)
                else trial.suggest_float(name, each.low, each.high, log=each.log)
            )
            for name, each in self.space.items()
        }

    def options(self, params: dict[str, Any]) -> dict[str, Any]:
        """A trial as arguments of `trl-qtarget sft`: the whole target, and the learning rate."""
        fields = {name: value for name, value in self.config.to_dict().items() if value is not None}
        fields |= params
        fields["method"] = self.config.method or "none"
        return fields


def _around(knob: Knob) -> BaseDistribution:
    """A knob between a fraction and a multiple of its default, as far as its range allows."""
    default, allowed = knob.default, knob.range
    ends = sorted((default / KNOB_FACTOR, default * KNOB_FACTOR)) if default else [-1.0, 1.0]
    low, high = max(ends[0], allowed.low), min(ends[1], allowed.high)
    if allowed.whole:
        return IntDistribution(max(1, math.ceil(low)), max(1, math.floor(high)), log=True)
    inside = 1e-3 * (high - low)
    low += inside if allowed.open_low and low == allowed.low else 0.0
    high -= inside if allowed.open_high and high == allowed.high else 0.0
    return FloatDistribution(low, high, log=low > 0)


def words(params: dict[str, Any]) -> str:
    """Parameters for people: `learning_rate 2e-05, lam 0.1`."""
    return ", ".join(f"{name} {value:.3g}" for name, value in params.items())


def fingerprint(candidates: list[Candidate]) -> str:
    """Equal for equal spaces."""
    return json.dumps([[each.name, each.config.to_dict(), each.rates, each.start] for each in candidates])
