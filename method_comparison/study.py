"""The whole study: which run comes next, on all cores at once. An interruption loses at most the runs in it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm.auto import tqdm

from . import models, runs
from .runs import TEST, TUNE, Run, make_run
from .search import Point, Search
from .settings import Method, Setting, Study
from .store import Store


# Trains and measures: a run of a study, with the folder of the models.
Execute = Callable[[Run, Study, Path], dict[str, Any]]
HALF_STEP_OF_RATE = 2**0.5
# Spawned: a forked child would share torch's threads with its parent.
_CONTEXT = multiprocessing.get_context("spawn")
# What a worker was given when it started: a shared counter of steps.
_worker = SimpleNamespace(steps=None)


@dataclass(frozen=True)
class Cell:
    """A method in a setting: tuned by a search, then tested with what the search chose."""

    setting: Setting
    method: Method

    def of_tuning(self, study: Study) -> "Cell":
        """The cell whose tuning decides: this one, unless the method takes over another's."""
        other = self.method.tuned_as
        return Cell(self.setting, study.method(other)) if other else self

    def search(self, study: Study) -> Search:
        """How its configurations are searched."""
        method, tuning = self.of_tuning(study).method, study.tuning
        return Search(len(method.ladder), method.start, tuning["runs"], tuning["extra"])

    def run(self, study: Study, point: Point, phase: str, seed: int) -> Run:
        """The run at a point of the search."""
        rate = study.tuning["middle_rate"] * HALF_STEP_OF_RATE**point.rate
        return make_run(self.setting, self.method, point.knob, rate, phase, seed)

    def scores(self, study: Study, store: Store) -> tuple[dict[Point, float], Point | None]:
        """Scores of the points that are known, and the point to try next; None when the search is over."""
        search, scores, tuned = self.search(study), {}, self.of_tuning(study)
        while (point := search.next(scores)) is not None:
            key = tuned.run(study, point, TUNE, study.tuning["seed"]).key
            if key not in store:
                return scores, point
            scores[point] = runs.score(store[key], self.setting, study)
        return scores, None

    def chosen(self, study: Study, store: Store) -> Point | None:
        """The best point; None while the search goes on."""
        scores, following = self.scores(study, store)
        return self.search(study).best(scores) if following is None else None

    def tests(self, study: Study, store: Store) -> list[Run]:
        """The test runs of the chosen point; none while the search goes on."""
        point = self.chosen(study, store)
        return [] if point is None else [self.run(study, point, TEST, seed) for seed in study.test["seeds"]]

    def final(self, study: Study, store: Store) -> Run | None:
        """The chosen point once more, on other demonstrations and prompts; None while the search goes on."""
        point = self.chosen(study, store)
        return None if point is None else self.run(study, point, TUNE, study.chooser["seed"])


def finalists(setting_cells: list[Cell], study: Study, store: Store) -> list[Cell]:
    """Of the methods of a setting those with the best tuning scores, and plain SFT; none while a search goes on."""
    if not study.chooser:
        return []
    scored = []
    for cell in setting_cells:
        if not cell.method.is_candidate:
            continue
        found, following = cell.scores(study, store)
        if following is not None:
            return []
        scored.append((max(found.values()), cell))
    ranked = [cell for _, cell in sorted(scored, key=lambda pair: -pair[0])]
    best, rest = ranked[: study.chooser["finalists"]], ranked[study.chooser["finalists"] :]
    return best + [cell for cell in rest if cell.method.name == "sft"]


def cells(study: Study) -> list[Cell]:
    """Every method in every setting that takes it."""
    return [Cell(setting, method) for setting in study.settings for method in study.methods if setting.takes(method)]


def control_runs(study: Study) -> list[Run]:
    """Runs that train nothing: the untrained bases, and the teachers of the settings that have one."""
    seeds, found = study.test["seeds"], {}
    for setting in study.settings:
        for seed in seeds:
            controls = [runs.base_run(setting, TEST, seed)]
            if setting.reference in study.teachers:
                controls.append(runs.model_run(setting.reference, setting, seed))
            found |= {run.key: run for run in controls}
    return list(found.values())


def pending(study: Study, store: Store) -> Iterator[Run]:
    """Runs that could start now, the first settings first; the same run may come more than once."""
    yield from (run for run in control_runs(study) if run.key not in store)
    for cell in cells(study):
        point = cell.scores(study, store)[1]
        if point is not None:
            yield cell.of_tuning(study).run(study, point, TUNE, study.tuning["seed"])
        else:
            yield from (run for run in cell.tests(study, store) if run.key not in store)
    for setting in study.settings:
        mine = [cell for cell in cells(study) if cell.setting == setting]
        finals = (cell.final(study, store) for cell in finalists(mine, study, store))
        yield from (run for run in finals if run.key not in store)


def total_runs(study: Study) -> int:
    """About how many runs there are: searches may take a few more."""
    distinct = {make_run(cell.setting, cell.method, cell.method.start, 1.0, TEST, 0).key for cell in cells(study)}
    return len(control_runs(study)) + len(distinct) * (study.tuning["runs"] + len(study.test["seeds"]))


def train_models(study: Study, directory: Path, workers: int) -> None:
    """Train the models that are not there yet, the longest training first."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in models.model_names(study) if not (directory / name).is_dir()]
    if not missing:
        return
    missing.sort(key=lambda name: -models.steps_of(study, name))
    steps = _CONTEXT.Value("i", 0)
    with (
        _pool(workers, steps) as pool,
        tqdm(total=sum(models.steps_of(study, name) for name in missing), desc="Pretraining", unit="step") as bar,
    ):
        left = {pool.submit(_train_model, study, name, directory) for name in missing}
        while left:
            done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(steps.value - bar.n)
            for future in done:
                future.result()


def _train_model(study: Study, name: str, directory: Path) -> None:
    models.train_model(study, name, directory, _worker.steps)


def train_all(
    study: Study,
    store: Store,
    directory: Path,
    workers: int,
    execute: Execute = runs.execute,
    threads: int = 1,
) -> None:
    """Do every run that has no result yet.

    Args:
        directory: where the models are.
        workers: runs at a time.
        execute: trains and measures.
        threads: of each worker.
    """
    running: dict[Future, Run] = {}
    with (
        _pool(workers, threads=threads) as pool,
        tqdm(total=max(total_runs(study), len(store.results)), initial=len(store.results), unit="run") as bar,
    ):
        try:
            while True:
                _submit(study, store, directory, pool, running, workers, execute)
                if not running:
                    break
                for future in wait(running, timeout=10, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    store.add(_result(future, run))
                    bar.set_postfix_str(f"{run.task} {run.kind} {run.method}", refresh=False)
                    bar.total = max(bar.total, len(store.results))
                    bar.update()
                bar.refresh()  # the time goes on
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        bar.total = len(store.results)


def _submit(
    study: Study,
    store: Store,
    directory: Path,
    pool: ProcessPoolExecutor,
    running: dict[Future, Run],
    workers: int,
    execute: Execute,
) -> None:
    keys = {run.key for run in running.values()}
    if len(keys) >= workers:
        return
    for run in pending(study, store):
        if run.key not in keys:
            keys.add(run.key)
            running[pool.submit(execute, run, study, directory)] = run
            if len(running) >= workers:
                return


def _result(future: Future, run: Run) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:
        raise RuntimeError(f"The run failed that is called: {run.key}") from error


def _pool(workers: int, steps: Any = None, threads: int = 1) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, _CONTEXT, initializer=_start_worker, initargs=(steps, threads))


def _start_worker(steps: Any, threads: int) -> None:
    _worker.steps = steps
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the parent says what is to be said
    # Where the parent is killed, nobody else would end its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runs.quiet(threads)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
