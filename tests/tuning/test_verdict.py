"""The decision rule on simulated studies: it keeps `sft` where nothing is better, and finds what is."""

import numpy as np
import pytest

from trl_qtarget.tuning.verdict import LOOKS, Difference, Outcome, judge, paired_difference


PROMPTS, SEEDS, TRIALS = 100, 3, 6
# Of one training's mean over its seed; of a method on a prompt; of a single answer.
TRAINING, PROMPT, ANSWER = 0.02, 0.1, 0.3


def confirmation_error() -> float:
    """The true standard error of a first look at a candidate, against the mean of two `sft`."""
    trainings = TRAINING**2 / SEEDS + ANSWER**2 / (SEEDS * PROMPTS)
    return float(np.sqrt(1.5 * trainings + 1.5 * PROMPT**2 / PROMPTS))


def winner_of_study(seed: int, gains: dict[str, float]) -> str | None:
    """A whole study in numbers: a search, its best two, a confirmation in up to two looks."""
    rng = np.random.default_rng(seed)
    error = confirmation_error()
    found = {name: max(gain + rng.normal(0, error, TRIALS)) for name, gain in gains.items()}
    best = sorted(gains, key=found.get)[-2:]
    # `sft` and `sft again` are one configuration: the same on a prompt, but for the seed and the answers.
    effects = {name: rng.normal(0, PROMPT, PROMPTS) for name in ("sft", *best)}
    scores = {}
    for look in range(LOOKS):
        for name in ("sft", "again", *best):
            own = rng.normal(0, TRAINING, (SEEDS, 1)) + rng.normal(0, ANSWER, (SEEDS, PROMPTS))
            own = 0.5 + gains.get(name, 0.0) + effects["sft" if name == "again" else name] + own
            scores[name] = np.concatenate([scores[name], own]) if look else own
        verdict = judge({name: scores[name] for name in best}, scores["sft"], scores["again"], look == LOOKS - 1)
        if not verdict.open:
            break
    return verdict.winner.name if verdict.winner else None


@pytest.mark.parametrize("studies", [20, 300])
def test_keeps_sft_where_nothing_is_better(studies):
    """19 of any 20 studies, and in the long run no more than the level."""
    gains = dict.fromkeys(("a", "b", "c"), 0.0)
    kept = sum(winner_of_study(seed, gains) is None for seed in range(studies))
    assert kept >= 0.95 * studies


@pytest.mark.parametrize("studies", [20, 300])
def test_finds_a_gain_of_three_standard_errors(studies):
    gains = {"a": 0.0, "b": 3 * confirmation_error(), "c": 0.0}
    found = sum(winner_of_study(seed, gains) == "b" for seed in range(studies))
    assert found >= 0.9 * studies


def test_error_is_that_of_repeated_studies():
    """Of many confirmations with fresh seeds and prompts, the spread is the reported error."""
    rng, values, errors = np.random.default_rng(0), [], []
    for _ in range(400):
        effects = rng.normal(0, PROMPT, (2, PROMPTS))

        def scores(effect, rng=rng):
            return effect + rng.normal(0, TRAINING, (SEEDS, 1)) + rng.normal(0, ANSWER, (SEEDS, PROMPTS))

        verdict = judge({"a": scores(effects[0])}, scores(effects[1]), scores(effects[1]))
        values.append(verdict.judged[0].difference.value)
        errors.append(verdict.judged[0].difference.error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.15)


def test_by_hand():
    """Two trainings, two prompts."""
    mean, over_prompts, noise = paired_difference([[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (mean, over_prompts) == (0.75, 0.125 / 2)
    # Residuals are all ±1/4 with one degree of freedom, over four scores.
    assert noise == pytest.approx(0.25 / 4)
    assert Difference(2.0, 1.0, 10).p_value == pytest.approx(0.036694, rel=1e-4)  # of a table of Student's t
    assert Difference(-2.0, 1.0, 10).p_value == pytest.approx(1 - 0.036694, rel=1e-4)
    assert Difference(0.1, 0.0, 4).p_value == 0.0 and Difference(0.0, 0.0, 4).p_value == 1.0


def test_a_number_per_training_is_enough():
    """A metric without prompts: the trainings alone say what chance does."""
    sft, again = [[0.50], [0.52], [0.51]], [[0.51], [0.50], [0.52]]
    verdict = judge({"a": [[0.80], [0.82], [0.81]], "b": [[0.51], [0.52], [0.50]]}, sft, again, last=True)
    assert [each.outcome for each in verdict.judged] == [Outcome.BETTER, Outcome.NOT_BETTER]
    assert verdict.winner.name == "a" and not verdict.open


def test_without_a_candidate_sft_is_kept():
    """All finalists may have failed."""
    assert judge({}, np.zeros((2, 3))).winner is None and not judge({}, np.zeros((2, 3)), np.ones((2, 3))).open


def test_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="same prompts"):
        judge({"a": np.zeros((2, 3))}, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="S >= 2"):
        judge({"a": np.zeros((1, 3))}, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="NaN"):
        judge({"a": np.full((2, 3), np.nan)}, np.zeros((2, 3)))
