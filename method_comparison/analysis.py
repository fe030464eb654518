"""From result files to numbers: accuracies per prompt, and paired differences with standard errors."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import runs
from .evaluation import mean
from .runs import Run
from .settings import Setting, Study
from .store import Store
from .study import Cell, cells, finalists


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

    `solved[measure][seed]` is the share of right answers to each prompt; `tuning_score` is the best score in tuning,
    on a seed and prompts of its own.
    """

    name: str
    results: tuple[dict[str, Any], ...]
    samples: int
    learning_rate: float | None = None
    knob: str = ""
    on_edge: bool = False
    tuning_score: float | None = None

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
    return with_error(seeds)


def with_error(seeds: Sequence[Sequence[float]]) -> Difference:
    """The mean of paired differences, a list of prompts for each seed, and the larger of its two errors."""
    prompts = [value for seed in seeds for value in seed]
    errors = [statistics.stdev(prompts) / len(prompts) ** 0.5 if len(prompts) > 1 else float("inf")]
    if len(seeds) > 1:
        errors.append(statistics.stdev(mean(seed) for seed in seeds) / len(seeds) ** 0.5)
    return Difference(mean(prompts), max(errors))


class Tested:
    """What has been tested in each setting of a study, read from its results once."""

    def __init__(self, study: Study, store: Store):
        self.study = study
        self.store = store
        self._cells = cells(study)
        self._rows = {setting.name: self._rows_of(setting) for setting in study.settings}

    def rows(self, setting: Setting) -> list[Row]:
        """The untrained base, the teacher if there is one, every method with all its seeds."""
        return list(self._rows[setting.name].values())

    def row(self, setting: Setting, name: str) -> Row | None:
        """The row of that name; None if it is not there, or not yet."""
        return self._rows[setting.name].get(name)

    def known_row(self, setting: Setting, name: str) -> Row:
        """The row of that name.

        Raises:
            ValueError: it has not been tested in the setting.
        """
        if (row := self.row(setting, name)) is None:
            raise ValueError(f"`{name}` was not tested in `{setting.name}`.")
        return row

    def difference(self, setting: Setting, name: str, baseline: str, measure: str) -> Difference:
        """A method minus a baseline.

        Raises:
            ValueError: one of the two has not been tested in the setting.
        """
        return difference(self.known_row(setting, name), self.known_row(setting, baseline), measure)

    def compared(self, name: str, baseline: str) -> list[Setting]:
        """The settings in which a method can be compared with a baseline, each pair of trainings once.

        Settings that differ only by the reference share the trainings of two methods that use none.
        """
        found: list[Setting] = []
        seen = set()
        for setting in self.settings(baseline):
            row, other = self.row(setting, name), self.row(setting, baseline)
            if row is None or row is other:
                continue
            trainings = tuple(result["key"] for result in (*row.results, *other.results))
            if trainings not in seen:
                seen.add(trainings)
                found.append(setting)
        return found

    def settings(self, baseline: str) -> list[Setting]:
        """The settings in which a baseline has been tested."""
        return [setting for setting in self.study.settings if self.row(setting, baseline)]

    def untested(self, setting: Setting) -> list[str]:
        """Names of the methods that a setting takes and that have not been tested in it with all seeds."""
        takes = [cell.method.name for cell in self._cells if cell.setting == setting]
        return [name for name in takes if self.row(setting, name) is None]

    def finals(self, setting: Setting) -> dict[str, tuple[dict[str, Any], ...]]:
        """What the finalists of a setting's tuning solved there, on both of its seeds; empty if one is missing."""
        seeds = (self.study.tuning["seed"], self.study.chooser["seed"])
        found = {}
        for cell in finalists([cell for cell in self._cells if cell.setting == setting], self.study, self.store):
            point = cell.chosen(self.study, self.store)
            keys = [cell.run(self.study, point, runs.TUNE, seed).key for seed in seeds]
            if not all(key in self.store for key in keys):
                return {}
            found[cell.method.name] = tuple(self.store[key] for key in keys)
        return found

    def rate_curves(self, method: str) -> list[dict[float, float]]:
        """For each setting, the best score in tuning at every learning rate that was tried."""
        return [self._rate_curve(cell) for cell in self._cells if cell.method.name == method]

    def _rows_of(self, setting: Setting) -> dict[str, Row]:
        seeds = self.study.test["seeds"]
        controls = {BASE: [runs.base_run(setting, runs.TEST, seed) for seed in seeds]}
        if setting.reference in self.study.teachers:
            controls[TEACHER] = [runs.model_run(setting.reference, setting, seed) for seed in seeds]
        found = [self._row(name, tests) for name, tests in controls.items()]
        found += [self._cell_row(cell) for cell in self._cells if cell.setting == setting]
        return {row.name: row for row in found if row}

    def _row(self, name: str, tests: list[Run], **choice: Any) -> Row | None:
        if not tests or not all(run.key in self.store for run in tests):
            return None
        return Row(name, tuple(self.store[run.key] for run in tests), self.study.test["samples"], **choice)

    def _cell_row(self, cell: Cell) -> Row | None:
        tests = cell.tests(self.study, self.store)
        if not tests:
            return None
        method, search, scores = cell.method, cell.search(self.study), cell.scores(self.study, self.store)[0]
        best = search.best(scores)
        knob = f"{method.knob} = {method.ladder[best.knob]:g}" if method.knob else ""
        return self._row(
            method.name,
            tests,
            learning_rate=tests[0].learning_rate,
            knob=knob,
            on_edge=bool(search.edges(scores)),
            tuning_score=scores[best],
        )

    def _rate_curve(self, cell: Cell) -> dict[float, float]:
        best: dict[float, float] = {}
        for point, score in cell.scores(self.study, self.store)[0].items():
            rate = cell.run(self.study, point, runs.TUNE, self.study.tuning["seed"]).learning_rate
            best[rate] = max(score, best.get(rate, 0.0))
        return dict(sorted(best.items()))
