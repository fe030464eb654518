"""How well one choice does in every setting: how often nothing beats it, and how far it stays behind the best."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .analysis import AT_ONE, GREEDY, MEASURES, Row, Tested, difference, with_error
from .evaluation import mean
from .settings import Setting


CHOOSER = "the best in tuning"
FAIR = "the fair chooser"
RULES = (CHOOSER, FAIR)
Rule = Callable[[Setting, list[Row], str], Row | None]


@dataclass(frozen=True)
class Choice:
    """A rule that takes one method in each setting.

    Attributes:
        name: a method that is always taken, or one of `RULES`.
        settings: in how many settings it takes one.
        unbeaten: for each measure, in how many of them no method is better beyond two standard errors.
        regret: for each measure, the mean distance in accuracy to the best method in hindsight.
        behind_sft: for each measure, the largest distance to plain SFT where that is better: 0 if it is nowhere,
            None if it was not tested there.
    """

    name: str
    settings: int
    unbeaten: tuple[int, ...]
    regret: tuple[float, ...]
    behind_sft: tuple[float | None, ...]


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
    unbeaten, regret, behind_sft, count = [], [], [], 0
    for measure in MEASURES:
        taken = [
            (row, [other for other in rows if other.name in judges])
            for setting, rows in settings
            if (row := rule(setting, rows, measure)) is not None
        ]
        count = len(taken)
        unbeaten.append(
            sum(
                not any(difference(other, row, measure).sign > 0 for other in rows if other is not row)
                for row, rows in taken
            )
        )
        # A control may by chance be better than the best: then nothing is ahead of it.
        behind = [max(0.0, *(each.accuracy(measure) - row.accuracy(measure) for each in rows)) for row, rows in taken]
        regret.append(mean(behind) if behind else 0.0)
        plain = [(row, other) for row, rows in taken for other in rows if other.name == "sft"]
        distances = [other.accuracy(measure) - row.accuracy(measure) for row, other in plain]
        behind_sft.append(max(0.0, *distances) if distances else None)
    return Choice(name, count, tuple(unbeaten), tuple(regret), tuple(behind_sft))
