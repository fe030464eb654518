"""From result files to numbers: accuracies per prompt, and paired differences with standard errors."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import runs
from .evaluation import mean
from .search import Point
from .settings import Setting, Study
from .store import Store
from .study import Cell, cells


# Names of the three ways to read an accuracy, as the tables print them.
AT_ONE, AT_BEST, GREEDY = "T = 1", "best T", "greedy"
MEASURES = (AT_ONE, AT_BEST, GREEDY)
BASE, TEACHER = "base", "teacher"


@dataclass(frozen=True)
class Difference:
    """A paired difference of two methods over the same prompts, and its standard error."""

    value: float
    error: float

    @property
    def sign(self) -> int:
        """1 or -1 where the difference lies beyond two standard errors, else 0."""
        return 0 if abs(self.value) <= 2 * self.error else 1 if self.value > 0 else -1


@dataclass(frozen=True)
class Row:
    """A method in a setting, over the seeds of the test.

    `solved[measure][seed]` is the share of right answers to each prompt.
    """

    name: str
    results: tuple[dict[str, Any], ...]
    samples: int
    learning_rate: float | None = None
    knob: str = ""
    on_edge: bool = False

    def solved(self, measure: str) -> list[list[float]]:
        """Share of right answers: a list of prompts for each seed."""
        if measure == GREEDY:
            return [[float(count) for count in result["solved"]["0"]] for result in self.results]
        if measure == AT_ONE:
            return self._at("1")
        return self._at_best()

    def accuracy(self, measure: str) -> float:
        """Mean over seeds and prompts."""
        return mean([mean(prompts) for prompts in self.solved(measure)])

    def mean(self, name: str) -> float:
        """Mean over seeds of a number such as `nll`."""
        return mean([result[name] for result in self.results])

    @property
    def others(self) -> float | None:
        """Accuracy on the other tasks, mean of greedy and temperature 1; None if it was not measured."""
        pairs = [value for result in self.results for pair in result["others"].values() for value in pair]
        return mean(pairs) if pairs else None

    @property
    def best_temperature(self) -> str:
        """The sampling temperature with the highest accuracy over all prompts."""
        return max(self._temperatures, key=lambda temperature: mean([mean(x) for x in self._at(temperature)]))

    @property
    def _temperatures(self) -> list[str]:
        return [temperature for temperature in self.results[0]["solved"] if temperature != "0"]

    def _at(self, temperature: str) -> list[list[float]]:
        return [[count / self.samples for count in result["solved"][temperature]] for result in self.results]

    def _at_best(self) -> list[list[float]]:
        """The temperature is chosen on one half of the prompts and measured on the other, and the reverse.

        Choosing and measuring on the same prompts would flatter every method a little, and noisy ones most.
        """
        tables = {temperature: self._at(temperature) for temperature in self._temperatures}
        halves = []
        for half in (0, 1):
            other = 1 - half
            chosen = max(tables, key=lambda name: mean([mean(prompts[other::2]) for prompts in tables[name]]))
            halves.append(tables[chosen])
        count = len(halves[0][0])
        return [[halves[index % 2][seed][index] for index in range(count)] for seed in range(len(self.results))]


def difference(row: Row, baseline: Row, measure: str) -> Difference:
    """Row minus baseline, prompt by prompt.

    Two errors are known: the spread over prompts says how well these models were measured, the spread over seeds (each
    with its own base, demonstrations and prompts) how far another training would differ. The larger one is taken: with
    few seeds their spread is sometimes small by chance.
    """
    pairs = zip(row.solved(measure), baseline.solved(measure), strict=True)
    seeds = [[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs]
    return _with_error(seeds)


def _with_error(seeds: Sequence[Sequence[float]]) -> Difference:
    prompts = [value for seed in seeds for value in seed]
    errors = [statistics.stdev(prompts) / len(prompts) ** 0.5 if len(prompts) > 1 else float("inf")]
    if len(seeds) > 1:
        errors.append(statistics.stdev(mean(seed) for seed in seeds) / len(seeds) ** 0.5)
    return Difference(mean(prompts), max(errors))


def rows(setting: Setting, study: Study, store: Store) -> list[Row]:
    """All that has been tested in a setting: the untrained base, the teacher if there is one, every method."""
    samples, seeds = study.test["samples"], study.test["seeds"]
    controls = {BASE: [runs.base_run(setting, runs.TEST, seed) for seed in seeds]}
    if setting.reference in study.teachers:
        controls[TEACHER] = [runs.model_run(setting.reference, setting, seed) for seed in seeds]
    found = []
    for name, wanted in controls.items():
        if all(run.key in store for run in wanted):
            found.append(Row(name, tuple(store[run.key] for run in wanted), samples))
    for cell in cells(study):
        if cell.setting == setting and (row := _row(cell, study, store)):
            found.append(row)
    return found


def _row(cell: Cell, study: Study, store: Store) -> Row | None:
    tests = cell.tests(study, store)
    if not tests or not all(run.key in store for run in tests):
        return None
    scores, _ = cell.scores(study, store)
    point = cell.search(study).best(scores)
    method = cell.method
    return Row(
        method.name,
        tuple(store[run.key] for run in tests),
        study.test["samples"],
        tests[0].learning_rate,
        f"{method.knob} = {method.ladder[point.knob]:g}" if method.knob else "",
        bool(cell.search(study).edges(scores)),
    )


def rate_curve(cell: Cell, study: Study, store: Store) -> dict[float, float]:
    """The best score in tuning at every learning rate that was tried."""
    scores, _ = cell.scores(study, store)
    best: dict[float, float] = {}
    for point, score in scores.items():
        rate = cell.run(study, Point(point.rate, point.knob), runs.TUNE, study.tuning["seed"]).learning_rate
        best[rate] = max(score, best.get(rate, 0.0))
    return dict(sorted(best.items()))
