"""Places that several workers fill: each once, whatever they do at the same time."""

import threading

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from trl_qtarget.tuning import slots
from trl_qtarget.tuning.slots import ERROR, MOST_ATTEMPTS, OWNER, PLACE, Slots


def places_in(file) -> Slots:
    """As a process of its own sees them."""
    storage = JournalStorage(JournalFileBackend(str(file)))
    return Slots(optuna.create_study(study_name="s", storage=storage, direction="maximize", load_if_exists=True))


def test_workers_at_the_same_time_fill_each_place_once(tmp_path):
    file, done, ready = tmp_path / "journal", [], threading.Barrier(4)

    def work() -> None:
        mine = places_in(file)
        ready.wait()
        while (trial := mine.take(12)) is not None:
            mine.study.tell(trial, float(trial.user_attrs[PLACE]))
            done.append(trial.user_attrs[PLACE])

    places_in(file)
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == list(range(12))
    assert sorted(places_in(file).finished()) == list(range(12))


def test_trial_of_a_dead_worker_is_taken_up_once(tmp_path, monkeypatch):
    first = places_in(tmp_path / "journal")
    trial = first.take(1)
    rate = trial.suggest_float("rate", 0, 1)
    trial.report(0.25, 1)
    trial.set_user_attr("seconds", 7.0)
    second, third = places_in(tmp_path / "journal"), places_in(tmp_path / "journal")
    assert second.take(1) is None, "its worker lives"
    trial.set_user_attr(OWNER, [trial.user_attrs[OWNER][0], 0, 0.0])  # of no process
    again = second.take(1)
    assert third.take(1) is None
    assert again.user_attrs[PLACE] == 0 and again.user_attrs["seconds"] == 7.0
    assert again.suggest_float("rate", 0, 1) == rate
    second.study.tell(again, 0.5)
    found = third.finished()[0]
    assert found.value == 0.5 and found.intermediate_values == {1: 0.25}


def test_a_silent_worker_elsewhere_is_waited_for(tmp_path, monkeypatch):
    """By this machine's clock alone, and from when it was first seen silent."""
    now = [1000.0]
    monkeypatch.setattr(slots.time, "monotonic", lambda: now[0])
    first, second = places_in(tmp_path / "journal"), places_in(tmp_path / "journal")
    trial = first.take(1)
    trial.set_user_attr(OWNER, ["elsewhere", 1, 0.0])
    assert second.take(1) is None
    now[0] += slots.PATIENCE - 1
    trial.set_user_attr("beat", 1)
    assert second.take(1) is None
    now[0] += slots.PATIENCE - 1
    assert second.take(1) is None
    now[0] += 2
    taken = second.take(1)
    assert taken.user_attrs[slots.PLACE] == 0 and taken.user_attrs[slots.ATTEMPTS] == 2


def test_trial_that_kills_its_workers_is_given_up(tmp_path):
    mine = places_in(tmp_path / "journal")
    for _ in range(MOST_ATTEMPTS):
        trial = mine.take(1)
        mine.release(trial.number)
    assert mine.take(1) is None
    assert mine.finished()[0].state == TrialState.FAIL and "died 5 times" in mine.finished()[0].user_attrs[ERROR]


@pytest.mark.parametrize("ended", [TrialState.COMPLETE, TrialState.PRUNED])
def test_a_trial_that_has_ended_is_not_given_back(tmp_path, ended):
    mine = places_in(tmp_path / "journal")
    trial = mine.take(1)
    trial.report(1.0, 1)
    mine.study.tell(trial, 1.0 if ended is TrialState.COMPLETE else None, ended)
    mine.release(trial.number)
    assert len(mine.trials()) == 1 and mine.take(1) is None
