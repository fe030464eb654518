"""How well one choice does in every setting: how often nothing beats it, and how far it stays behind the best."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .analysis import AT_ONE, GREEDY, MEASURES, Row, Tested, difference, with_error
from .evaluation import mean
from .settings import Setting


CHOOSER = "the best in tuning"
FAIR = "the fair chooser"
RULES = (CHOOSER, FAIR)
Rule = Callable[[Setting, list[Row], str], Row | None]


@dataclass(frozen=True)
class Verdict:
    """What one choice is worth in one setting, in one measure.

    Attributes:
        unbeaten: no method is better beyond two standard errors.
        regret: the distance in accuracy to the best method in hindsight.
        behind_sft: the distance to plain SFT where that is better, else 0; None if it was not tested there.
    """

    unbeaten: bool
    regret: float
    behind_sft: float | None


@dataclass(frozen=True)
class Choice:
    """A rule that takes one method in each setting.

    Attributes:
        name: a method that is always taken, or one of `RULES`.
        verdicts: for each setting in which it takes one, the verdict by measure.
    """

    name: str
    verdicts: tuple[dict[str, Verdict], ...]

    @property
    def settings(self) -> int:
        """In how many settings it takes a method."""
        return len(self.verdicts)

    @property
    def unbeaten(self) -> tuple[int, ...]:
        """For each measure, in how many settings no method is better beyond two standard errors."""
        return tuple(sum(each[measure].unbeaten for each in self.verdicts) for measure in MEASURES)

    @property
    def regret(self) -> tuple[float, ...]:
        """For each measure, the mean distance in accuracy to the best method in hindsight."""
        return tuple(mean([each[measure].regret for each in self.verdicts]) for measure in MEASURES)

    @property
    def behind_sft(self) -> tuple[float | None, ...]:
        """For each measure, the largest distance to plain SFT in any setting; None if that was tested in none."""
        columns = [[each[measure].behind_sft for each in self.verdicts] for measure in MEASURES]
        found = [[value for value in column if value is not None] for column in columns]
        return tuple(max(column) if column else None for column in found)


@cache  # of the one `Tested` that a page is made from: sentences ask for it as well as the table
def choices(tested: Tested) -> list[Choice]:
    """Every method taken always, and the rules that take one in each setting by its tuning; the best first.

    A control, which is a method for the second time, is judged and judges nobody: it would beat its twin by chance. A
    variant for a few settings does neither.
    """
    judges = {method.name for method in tested.study.methods if method.is_candidate}
    rules: dict[str, Rule] = {method.name: _always(method.name) for method in tested.study.common_methods}
    rules[CHOOSER] = lambda setting, rows, measure: max(
        (row for row in rows if row.name in judges), key=lambda row: row.tuning_score
    )
    rules[FAIR] = lambda setting, rows, measure: _fair(tested.finals(setting), rows, measure, tested)
    settings = [(setting, _methods(setting, tested)) for setting in tested.study.settings]
    settings = [(setting, rows) for setting, rows in settings if any(row.name in judges for row in rows)]
    found = [_judged(name, rule, settings, judges) for name, rule in rules.items()]
    return sorted((each for each in found if each.settings), key=lambda each: (-sum(each.unbeaten), sum(each.regret)))


def _always(name: str) -> Rule:
    return lambda setting, rows, measure: next((row for row in rows if row.name == name), None)


def _fair(finals: dict[str, tuple[dict[str, Any], ...]], rows: list[Row], measure: str, tested: Tested) -> Row | None:
    """Of the finalists the one that is farthest above plain SFT in the measure, one standard error taken off; or SFT.

    Both are read from tuning, on two seeds. The temperatures of tuning are 0 and 1, so the best one stands for both.
    """
    if "sft" not in finals:
        return None
    gains = {}
    for name, results in finals.items():
        pairs = zip(results, finals["sft"], strict=True)
        found = with_error([_gains(mine, theirs, measure, tested.study.tuning["samples"]) for mine, theirs in pairs])
        gains[name] = 0.0 if name == "sft" else found.value - found.error
    chosen = max(gains, key=lambda name: (gains[name], name == "sft"))
    return next(row for row in rows if row.name == chosen)


def _gains(mine: dict[str, Any], theirs: dict[str, Any], measure: str, samples: int) -> list[float]:
    """What is solved more often, prompt by prompt."""
    at_one, greedy = (
        [(a - b) / count for a, b in zip(mine["solved"][name], theirs["solved"][name], strict=True)]
        for name, count in (("1", samples), ("0", 1))
    )
    both = [(a + b) / 2 for a, b in zip(at_one, greedy, strict=True)]
    return {AT_ONE: at_one, GREEDY: greedy}.get(measure, both)


def _methods(setting: Setting, tested: Tested) -> list[Row]:
    return [row for row in tested.rows(setting) if row.tuning_score is not None]


def _judged(name: str, rule: Rule, settings: list[tuple[Setting, list[Row]]], judges: set[str]) -> Choice:
    verdicts = []
    for setting, rows in settings:
        taken = {measure: rule(setting, rows, measure) for measure in MEASURES}
        if all(taken.values()):
            verdicts.append({measure: _verdict(row, rows, judges, measure) for measure, row in taken.items()})
    return Choice(name, tuple(verdicts))


def _verdict(row: Row, rows: list[Row], judges: set[str], measure: str) -> Verdict:
    others = [other for other in rows if other.name in judges and other is not row]
    behind = {other.name: other.accuracy(measure) - row.accuracy(measure) for other in others}
    return Verdict(
        unbeaten=not any(difference(other, row, measure).sign > 0 for other in others),
        # A control may by chance be better than the best: then nothing is ahead of it.
        regret=max([0.0, *behind.values()]),
        behind_sft=0.0 if row.name == "sft" else max(0.0, behind["sft"]) if "sft" in behind else None,
    )
