"""Trials that several workers share: an Optuna study with so many places, each filled once.

A trial of a worker that died is taken up by another with the same parameters and in the same folder. Nothing here
trusts the clocks of two machines to agree.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial


PLACE, OWNER, BEAT, ERROR, ATTEMPTS = "place", "owner", "beat", "error", "attempts"
# Seconds between two signs of life, and without one until a worker on another machine counts as dead.
BEATING, PATIENCE = 15.0, 180.0
# Attempts at a trial whose worker dies each time.
MOST_ATTEMPTS = 5


@dataclass
class Slots:
    """The places of one study.

    A trial that has failed without `ERROR` never was: a surplus of two workers at once, or one that was taken up
    again under another number.
    """

    study: optuna.Study
    _seen: dict[int, tuple[object, float]] = field(default_factory=dict)

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, by their number."""
        found = self.study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state != TrialState.FAIL or ERROR in trial.user_attrs]

    def finished(self) -> dict[int, FrozenTrial]:
        """Finished trials by place: complete, pruned, or failed for good."""
        done = [trial for trial in self.trials() if trial.state.is_finished()]
        return {trial.user_attrs[PLACE]: trial for trial in done}

    def take(self, places: int) -> optuna.Trial | None:
        """A trial for a place that nobody fills, marked with it and as this worker's; None if there is none now."""
        self._take_from_the_dead()
        trials = self.trials()
        taken = {trial.user_attrs[PLACE] for trial in trials if PLACE in trial.user_attrs}
        if len(taken) >= places and not any(trial.state == TrialState.WAITING for trial in trials):
            return None
        trial = self.study.ask()
        if PLACE not in trial.user_attrs:
            place = self._place_of(trial.number)
            if place >= places:
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            trial.set_user_attr(PLACE, place)
        trial.set_user_attr(OWNER, _me())
        trial.set_user_attr(ATTEMPTS, trial.user_attrs.get(ATTEMPTS, 0) + 1)
        return trial

    def _place_of(self, number: int) -> int:
        """The place of a new trial: numbers are given in order, so all who count come to the same."""
        taken = {trial.user_attrs[PLACE] for trial in self.trials() if PLACE in trial.user_attrs}
        unmarked = [trial for trial in self.trials() if PLACE not in trial.user_attrs and trial.number < number]
        for _ in range(len(unmarked) + 1):
            place = next(each for each in range(len(taken) + 1) if each not in taken)
            taken.add(place)
        return place

    def release(self, number: int) -> None:
        """Give a running trial back: somebody takes it up where it was."""
        trial = next(each for each in self.study.get_trials(deepcopy=False) if each.number == number)
        attempts = trial.user_attrs.get(ATTEMPTS, 1)
        storage, lost = self.study._storage, attempts >= MOST_ATTEMPTS
        if lost:
            with suppress(UpdateFinishedTrialError):
                self._set_attr(trial, ERROR, f"its worker died {attempts} times")
        try:
            # Only one of several who try it gets past this.
            storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        except UpdateFinishedTrialError:
            return
        if not lost:
            keep = {name: value for name, value in trial.user_attrs.items() if name not in (OWNER, BEAT)}
            rungs = {name: value for name, value in trial.system_attrs.items() if name.startswith("completed_rung")}
            self.study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    user_attrs=keep,
                    system_attrs={"fixed_params": trial.params, **rungs},
                    intermediate_values=trial.intermediate_values,
                )
            )

    def _set_attr(self, trial: FrozenTrial, name: str, value: object) -> None:
        self.study._storage.set_trial_user_attr(trial._trial_id, name, value)

    def _take_from_the_dead(self) -> None:
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and self._is_dead(trial):
                self.release(trial.number)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether its process is gone, where it ran on this machine; else whether it has been silent too long."""
        owner = trial.user_attrs.get(OWNER)
        if owner is not None and owner[0] == socket.gethostname():
            with suppress(psutil.Error):
                return psutil.Process(owner[1]).create_time() != owner[2]
            return True
        sign = (owner, trial.user_attrs.get(BEAT))
        if self._seen.get(trial.number, (None, 0.0))[0] != sign:
            self._seen[trial.number] = (sign, time.monotonic())
        return time.monotonic() - self._seen[trial.number][1] > PATIENCE

    @contextmanager
    def beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Show that this worker lives, while it works on a trial."""
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(BEATING):
                count += 1
                # A storage that cannot be reached now may be reached the next time.
                with suppress(Exception):
                    trial.set_user_attr(BEAT, count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _me() -> list[object]:
    return [socket.gethostname(), os.getpid(), psutil.Process().create_time()]
