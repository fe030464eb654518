"""How well one choice does in every setting: how often nothing beats it, and how far it stays behind the best."""

from collections.abc import Callable
from dataclasses import dataclass

from .analysis import MEASURES, Row, Tested, difference
from .evaluation import mean
from .settings import Setting


CHOOSER = "the best in tuning"


@dataclass(frozen=True)
class Choice:
    """A rule that takes one method in each setting.

    Attributes:
        name: a method that is always taken, or `CHOOSER`.
        settings: in how many settings it takes one.
        unbeaten: for each measure, in how many of them no method is better beyond two standard errors.
        regret: for each measure, the mean distance in accuracy to the best method in hindsight.
    """

    name: str
    settings: int
    unbeaten: tuple[int, ...]
    regret: tuple[float, ...]


def choices(tested: Tested) -> list[Choice]:
    """Every method taken always, and in each setting the method with the best tuning score; the best rule first.

    A control, which is a method for the second time, is judged and judges nobody: it would beat its twin by chance.
    """
    methods = {method.name: method.replica for method in tested.study.methods}

    def always(name: str) -> Callable[[list[Row]], Row | None]:
        return lambda rows: next((row for row in rows if row.name == name), None)

    rules = {name: always(name) for name in methods}
    rules[CHOOSER] = lambda rows: max((row for row in rows if not methods[row.name]), key=lambda row: row.tuning_score)
    settings = [_methods(setting, tested) for setting in tested.study.settings]
    controls = {name for name, replica in methods.items() if replica}
    found = [_judged(name, rule, [rows for rows in settings if rows], controls) for name, rule in rules.items()]
    return sorted((each for each in found if each.settings), key=lambda each: (-sum(each.unbeaten), sum(each.regret)))


def _methods(setting: Setting, tested: Tested) -> list[Row]:
    return [row for row in tested.rows(setting) if row.tuning_score is not None]


def _judged(
    name: str, rule: Callable[[list[Row]], Row | None], settings: list[list[Row]], controls: set[str]
) -> Choice:
    taken = [(rule(rows), [row for row in rows if row.name not in controls]) for rows in settings]
    taken = [(row, rows) for row, rows in taken if row is not None]
    unbeaten, regret = [], []
    for measure in MEASURES:
        unbeaten.append(
            sum(
                not any(difference(other, row, measure).sign > 0 for other in rows if other is not row)
                for row, rows in taken
            )
        )
        # A control may by chance be better than the best: then nothing is ahead of it.
        behind = [max(0.0, *(each.accuracy(measure) - row.accuracy(measure) for each in rows)) for row, rows in taken]
        regret.append(mean(behind) if behind else 0.0)
    return Choice(name, len(taken), tuple(unbeaten), tuple(regret))
