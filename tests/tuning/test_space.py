"""What is searched of each method: every place of it is a target, and the first is the published one."""

import optuna
import pytest

from trl_qtarget import METHODS, QTargetConfig
from trl_qtarget.tuning.space import RATE, Candidate


def candidate(name: str, config: QTargetConfig) -> Candidate:
    return Candidate(name, config, (1e-5, 1e-3), 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_place_is_a_target(method):
    """Both ends of each knob, and the defaults."""
    mine = candidate(method, QTargetConfig(method))
    measured = set(mine.config.open_knobs)
    assert set(mine.space) == {RATE, *METHODS[method].knobs} - measured
    for ends in (lambda each: each.low, lambda each: each.high):
        params = {name: ends(each) for name, each in mine.space.items() if name != RATE}
        assert QTargetConfig.coerce({"method": method, **params}).knobs.items() >= params.items()
    for name, value in mine.defaults.items():
        assert mine.space[name].low <= value <= mine.space[name].high
    defaults = mine.options({name: value for name, value in mine.defaults.items() if name != RATE})
    assert QTargetConfig.coerce(defaults).target == QTargetConfig(method).target


def test_what_is_given_is_not_tuned():
    given = candidate("asft:lam=0.03", QTargetConfig("asft", lam=0.03, prior="lagged"))
    assert set(given.space) == {RATE}
    options = given.options({RATE: 2e-5})
    assert options == {"method": "asft", "lam": 0.03, "prior": "lagged", RATE: 2e-5, "kernel": "auto"}
    free = candidate("free", QTargetConfig(method=None, trust="min(1, p / 0.1)", residual="guided"))
    assert set(free.space) == {RATE, "eta"}
    assert free.options({"eta": 0.3})["method"] == "none"
    study = optuna.create_study()
    assert set(free.suggest(study.ask())) == {RATE, "eta"}
