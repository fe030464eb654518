"""A study: rounds of trials in which every method gets one, the finalists' fresh trainings, and the verdict.

All that is known lies in Optuna's storage, and what comes next depends on that alone. So any number of workers share a
study, and one that was interrupted goes on where it was.
"""

import logging
import math
import re
import time
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from .data import Sets
from .metrics import mean
from .slots import ERROR, PLACE, Slots
from .space import Candidate, fingerprint, words
from .trial import REDUCTION, Evaluation, Stopwatch, Training, TrainingFailed, clear, rung_checkpoint
from .verdict import LOOKS, Verdict, judge


logger = logging.getLogger("trl_qtarget")

SFT, AGAIN = "sft", "sft again"
# User attributes of trials and of the study.
SCORES, SECONDS, RETENTION = "scores", "seconds", "retention"
ROUNDS, FINALISTS, LOOKED, SETTINGS = "rounds", "finalists", "looks", "settings"
_POLL = 2.0


@dataclass(frozen=True)
class Plan:
    """What a study is made of.

    Attributes:
        folder: of the study.
        candidates: the methods, `sft` first.
        training: how they are trained.
        evaluation: how they are measured.
        sets: the data.
        trials: of every method before any is favoured.
        budget: seconds of work, of all workers together; None: `trials` of each method, and no more.
        finalists: methods that are confirmed beside `sft`.
        seeds: fresh trainings of each of them in one look.
        seed: of the search; those of the confirmation are 1000 above.
    """

    folder: Path
    candidates: tuple[Candidate, ...]
    training: Training
    evaluation: Evaluation
    sets: Sets
    trials: int = 6
    budget: float | None = None
    finalists: int = 2
    seeds: int = 3
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What two workers of one study must agree on."""
        metric = self.evaluation.metric
        return {
            "methods": fingerprint(list(self.candidates)),
            "metric": repr(metric),
            "recipe": repr(sorted(self.training.recipe.items(), key=str)),
            "rungs": self.training.rungs,
            "trials": self.trials,
            "finalists": self.finalists,
            "confirm_seeds": self.seeds,
            "seed": self.seed,
            "rows": self.sets.counts(),
        }


@dataclass
class Study:
    """A plan and its state.

    Args:
        plan: what to do.
        storage: of Optuna.
        name: of the study in it.

    Raises:
        ValueError: the storage holds a study of that name with other settings.
    """

    plan: Plan
    storage: optuna.storages.BaseStorage
    name: str
    _slots: dict[str, Slots] = field(default_factory=dict)

    def __post_init__(self):
        for candidate in self.plan.candidates:
            # One study per method: pruning and sampling never compare two of them.
            self._slots[candidate.name] = Slots(self._open(f"{self.name}/search/{candidate.name}"))
        self.confirmation = Slots(self._open(f"{self.name}/confirm"))
        former = self._main.user_attrs.get(SETTINGS)
        if former is None:
            self._main.set_user_attr(SETTINGS, self.plan.settings)
        elif former != self.plan.settings:
            wanted = self.plan.settings
            changed = [name for name in wanted if former.get(name) != wanted[name]]
            raise ValueError(
                f"`{changed[0] if changed else 'study_name'}` is not that of the study which `storage` holds: go on "
                "with the same command, or choose another `output_dir` or `study_name`."
            )

    def _open(self, name: str) -> optuna.Study:
        pruner = optuna.pruners.NopPruner()
        if self.plan.training.rungs:
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
        return optuna.create_study(
            study_name=name, storage=self.storage, direction="maximize", load_if_exists=True, pruner=pruner
        )

    @cached_property
    def _main(self) -> optuna.Study:
        return self._open(self.name)

    @cached_property
    def _search_rows(self) -> Any:
        return self.plan.sets.rows("search")

    @cached_property
    def _confirm_rows(self) -> Any:
        return self.plan.sets.rows("confirm")

    # --- what comes next ---

    def work(self) -> None:
        """Do what there is to do until the study has its verdict.

        Raises:
            ValueError: no trial of `sft`, or no trial of any other method, has succeeded.
            CachingFailed: the prior that they share could not be cached.
        """
        if not self.done:
            self.plan.training.ask_prior(self.plan.candidates, self.plan.seed)
        while not self.done:
            if not self._step():
                time.sleep(_POLL)  # another worker is on the last of it

    def _step(self) -> bool:
        rounds = self._main.user_attrs.get(ROUNDS)
        if rounds is None:
            self._main.set_user_attr(ROUNDS, [[each.name for each in self.plan.candidates]])
            return True
        places: dict[str, int] = {}
        for names in rounds:
            for name in names:
                places[name] = places.get(name, 0) + 1
                if (trial := self._slots[name].take(places[name])) is not None:
                    self._search(self._candidate(name), trial)
                    return True
        if any(len(self._slots[name].finished()) < count for name, count in places.items()):
            return False
        if FINALISTS not in self._main.user_attrs:
            if another := self._another_round(rounds):
                self._main.set_user_attr(ROUNDS, [*rounds, another])
            else:
                finalists = self._choose_finalists()
                self._main.set_user_attr(LOOKED, 1)  # before the finalists, which say that the confirmation has begun
                self._main.set_user_attr(FINALISTS, finalists)
            return True
        looks = self.looks
        count = looks * self.plan.seeds * len(self.configurations)
        if (trial := self.confirmation.take(count)) is not None:
            self._confirm(trial)
            return True
        if len(self.confirmation.finished()) < count:
            return False
        if not self.done:  # so this look has left it open
            self._main.set_user_attr(LOOKED, looks + 1)
        return True

    def _another_round(self, rounds: list[list[str]]) -> list[str] | None:
        """The methods of the next round; None to end the search."""
        plan, everything = self.plan, [each.name for each in self.plan.candidates]
        names = everything
        if len(rounds) >= plan.trials:
            if plan.budget is None:
                return None
            others = sorted((name for name in everything[1:] if self.best(name)), key=self._rank)
            names = [SFT, *others[: math.ceil(len(others) / 2)]]
        if plan.budget is None:
            return names
        # Pruned trials are shorter; the mean has them in it.
        times = [trial.user_attrs.get(SECONDS, 0.0) for name in everything for trial in self.search_trials(name)]
        left = plan.budget - self.spent - self._confirmation_time()
        return names if len(names) * mean(times) <= left else None

    def _confirmation_time(self) -> float:
        whole = [
            trial.user_attrs.get(SECONDS, 0.0)
            for each in self.plan.candidates
            for trial in self.search_trials(each.name)
            if trial.state == TrialState.COMPLETE
        ]
        return (mean(whole) if whole else 0.0) * self.plan.seeds * (self.plan.finalists + 2)

    def _rank(self, name: str) -> float:
        return -self.best(name).value

    def _choose_finalists(self) -> list[dict[str, Any]]:
        names = [each.name for each in self.plan.candidates[1:] if self.best(each.name)]
        for wanted, found in ((SFT, self.best(SFT)), ("another method", names)):
            if not found:
                failed = [error for each in self.plan.candidates for error in self.failures(each.name)]
                raise ValueError(
                    f"`methods`: no trial of {wanted} has succeeded: {failed[0] if failed else 'none ended'}."
                )
        chosen = sorted(names, key=self._rank)[: self.plan.finalists]
        return [{"name": name, "params": self.best(name).params} for name in (SFT, *chosen)]

    # --- what is known ---

    def _candidate(self, name: str) -> Candidate:
        return next(each for each in self.plan.candidates if each.name == name)

    def search_trials(self, name: str) -> list[FrozenTrial]:
        """Finished trials of a method, in the order of their places."""
        return [trial for _, trial in sorted(self._slots[name].finished().items())]

    def best(self, name: str) -> FrozenTrial | None:
        """The best complete trial of a method; of equals the first."""
        whole = [trial for trial in self.search_trials(name) if trial.state == TrialState.COMPLETE]
        return max(whole, key=lambda trial: trial.value, default=None)

    def failures(self, name: str) -> list[str]:
        """What went wrong in trials of a method."""
        return [trial.user_attrs[ERROR] for trial in self.search_trials(name) if ERROR in trial.user_attrs]

    @property
    def spent(self) -> float:
        """Seconds of work on finished trials, of all workers together."""
        trials = [trial for slots in (*self._slots.values(), self.confirmation) for trial in slots.trials()]
        return math.fsum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials)

    @property
    def configurations(self) -> list[dict[str, Any]]:
        """What is confirmed: tuned `sft`, the finalists, `sft` again."""
        found = self._main.user_attrs.get(FINALISTS, [])
        return [*found, {**found[0], "name": AGAIN}] if found else []

    @property
    def looks(self) -> int:
        """Looks at the confirmation that were begun."""
        return self._main.user_attrs.get(LOOKED, 0)

    def confirmed(self) -> dict[str, list[FrozenTrial]]:
        """Finished trainings of the confirmation by configuration, in the order of their seeds."""
        count, names = len(self.configurations), [each["name"] for each in self.configurations]
        found: dict[str, list[FrozenTrial]] = {name: [] for name in names}
        for place, trial in sorted(self.confirmation.finished().items()):
            found[names[place % count]].append(trial)
        return found

    @property
    def done(self) -> bool:
        """Whether there is a verdict, and nothing more to do."""
        if not self.configurations:
            return False
        if len(self.confirmation.finished()) < self.looks * self.plan.seeds * len(self.configurations):
            return False
        return self.looks == LOOKS or not self._could_look_again()

    def _could_look_again(self) -> bool:
        if self.plan.budget is not None and self.spent + self._confirmation_time() > self.plan.budget:
            return False
        return self._judged(last=False).open

    def verdict(self) -> Verdict:
        """What the confirmation says.

        Raises:
            ValueError: a confirming training of `sft` has failed, so there is nothing to compare with.
        """
        return self._judged(last=True)

    def _judged(self, last: bool) -> Verdict:
        scores = {}
        for name, trials in self.confirmed().items():
            if all(SCORES in trial.user_attrs for trial in trials):
                scores[name] = [trial.user_attrs[SCORES] for trial in trials]
            elif name == SFT:
                error = next(trial.user_attrs[ERROR] for trial in trials if ERROR in trial.user_attrs)
                raise ValueError(
                    f"`methods`: a confirming training of `sft` failed, nothing can be compared: {error}."
                )
        sft, again = scores.pop(SFT), scores.pop(AGAIN, None)
        return judge(scores, sft, again, last)

    # --- work ---

    def _search(self, candidate: Candidate, trial: optuna.Trial) -> None:
        slots, place = self._slots[candidate.name], trial.user_attrs[PLACE]
        slots.study.sampler = self._sampler(candidate, place)
        params = candidate.suggest(trial)
        folder = self.plan.folder / "search" / f"{folder_name(candidate.name)}-{place:03d}"
        logger.info(f"{candidate.name}, trial {place + 1}: {words(params)}")
        self._do(slots, trial, folder, lambda: self._climb(candidate, trial, params, folder))

    def _sampler(self, candidate: Candidate, place: int) -> BaseSampler:
        """First the published knobs at the recipe's rate, then random places, the same for all, then what was seen."""
        seed = zlib.crc32(f"{self.plan.seed} {place}".encode())
        sampler = TPESampler(n_startup_trials=max(2, self.plan.trials // 2), seed=seed, constant_liar=False)
        return PartialFixedSampler(candidate.defaults, sampler) if place == 0 else sampler

    def _climb(self, candidate: Candidate, trial: optuna.Trial, params: dict[str, Any], folder: Path) -> list[float]:
        plan, training, options = self.plan, self.plan.training, candidate.options(params)
        known = self._slots[candidate.name].study._storage.get_trial(trial._trial_id).intermediate_values
        for rung in range(training.rungs):
            step = REDUCTION**rung
            if step in known:
                continue
            if rung_checkpoint(folder, rung) is None:
                reached = lambda rung=rung: rung_checkpoint(folder, rung) is not None  # noqa: E731
                training.run(candidate.name, options, folder, plan.seed, training.rungs, reached)
            checkpoint = rung_checkpoint(folder, rung)
            if checkpoint is None:  # a training too short for it
                break
            trial.report(mean(plan.evaluation.scores(checkpoint, self._search_rows)), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        training.run(candidate.name, options, folder, plan.seed, training.rungs, lambda: False)
        return plan.evaluation.scores(folder, self._search_rows)

    def _confirm(self, trial: optuna.Trial) -> None:
        number, which = divmod(trial.user_attrs[PLACE], len(self.configurations))
        chosen = self.configurations[which]
        name, params, again = chosen["name"], chosen["params"], chosen["name"] == AGAIN
        # Trainings of one number share their seed, but for `sft again`, which has its own.
        seed = self.plan.seed + (2000 if again else 1000) + number
        folder = self.plan.folder / "confirm" / f"{folder_name(name)}-{number}"
        logger.info(f"Confirming {name}, training {number + 1}: {words(params)}")

        def train() -> list[float]:
            candidate = self._candidate(SFT if again else name)
            self.plan.training.run(candidate.name, candidate.options(params), folder, seed, 0, lambda: False)
            if (retention := self.plan.evaluation.retention(folder)) is not None:
                trial.set_user_attr(RETENTION, retention)
            return self.plan.evaluation.scores(folder, self._confirm_rows)

        self._do(self.confirmation, trial, folder, train, keep_model=True)

    def _do(self, slots: Slots, trial: optuna.Trial, folder: Path, work: Any, keep_model: bool = False) -> None:
        """Do a trial and write down what came of it; give it back where this worker is interrupted."""
        watch = Stopwatch(trial.user_attrs.get(SECONDS, 0.0))
        state, value, error = TrialState.FAIL, None, None
        try:
            with slots.beating(trial):
                scores = work()
            if not all(map(math.isfinite, scores)):
                raise TrainingFailed("the model gives scores that are NaN or infinite")
            trial.set_user_attr(SCORES, scores)
            state, value = TrialState.COMPLETE, mean(scores)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except (KeyboardInterrupt, SystemExit):
            trial.set_user_attr(SECONDS, watch.seconds)
            slots.release(trial.number)
            raise
        except Exception as failure:  # of a training, or of a user's metric: the other trials go on
            error = f"{type(failure).__name__}: {failure}"
            logger.warning(f"The trial in {folder} failed: {error}")
            trial.set_user_attr(ERROR, error)
        trial.set_user_attr(SECONDS, watch.seconds)
        clear(folder, keep_model)
        slots.study.tell(trial, value, state)
        outcome = error or ("pruned" if value is None else f"{value:.4f}")
        logger.info(f"  {outcome} ({watch.seconds:.0f} s)")


def folder_name(name: str) -> str:
    """A method's name, or what a formula leaves of it, as the name of a folder."""
    plain = re.sub(r"[^\w.=-]+", "_", name).strip("_")[:60]
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"
