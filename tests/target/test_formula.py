"""Trusts and scales written as formulas: they are the designs they spell, and nothing else than a formula is read."""

import copy
import json
import math
import pickle

import pytest
import torch
from problems import make_problem, relative_error

from trl_qtarget import QTargetConfig, build_target, linear_qtarget_loss, qtarget_loss
from trl_qtarget.target.formula import KNOWN, Formula


# Two orders of the same float64 operations, as in test_exactness.
TOLERANCE = 1e-12

EXPECTED_RANK = "where(H >= 2 * log(2), exp(H) / 4 + 1, 2 - p_max)"
# A formula with its knobs, and the built-in trust that it spells.
SPELLED = {
    "1": ({}, "one"),
    "p": ({}, "probability"),
    "p ** alpha": ({"alpha": 0.3}, "power"),
    "p > tau": ({"tau": 0.2}, "threshold"),
    "min(1, p / tau)": ({"tau": 0.2}, "capped_probability"),
    "p / (p + lam)": ({"lam": 0.2}, "probability_anchor"),
    "p * (1 - p)": ({}, "uncertainty"),
    "r": ({}, "prior_probability"),
    "where(p / r < 1 + epsilon, p / r, 0)": ({"epsilon": 0.3}, "clipped_ratio"),
    "p ** collision": ({}, "collision_power"),
    "exp(-((margin - beta) / tau) ** 2 / 2)": ({"beta": 1.5, "tau": 0.8}, "margin"),
    "weight": ({}, "token_weights"),
    "sigmoid(log_r + beta + log(1 - exp(-beta)))": ({"beta": 2.0}, "tilt"),
    f"p * max(p * {EXPECTED_RANK}, 1e-6) ** -((log(max({EXPECTED_RANK}, rank) + 1) / log(2)) ** -2)": (
        {},
        "relative_rank",
    ),
}


@pytest.mark.parametrize("text", SPELLED)
def test_formula_is_the_design_that_it_spells(text):
    knobs, trust = SPELLED[text]
    problem = make_problem(29, 101, 17, 2)
    results = []
    for name in (text, trust):
        config = QTargetConfig(method=None, trust=name, residual="prior", **knobs)
        leaves = problem.leaves()
        output = linear_qtarget_loss(*leaves[:2], problem.labels, config, bias=leaves[2], **problem.linear_arguments())
        dense = qtarget_loss(problem.logits(), problem.labels, config, **problem.dense_arguments())
        results.append([output.loss, dense, output.trust, *torch.autograd.grad(output.loss, leaves)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other, 1e-2) < TOLERANCE


def test_scale_multiplies_the_gradient():
    problem = make_problem(13, 37, 6, 1)
    asft = build_target(problem.logits(), problem.labels, QTargetConfig("asft", lam=0.2), **problem.dense_arguments())
    free = QTargetConfig(method=None, trust="p / (p + lam)", residual="prior", scale="p + lam", lam=0.2)
    own = build_target(problem.logits(), problem.labels, free, **problem.dense_arguments())
    assert relative_error(own.scale, asft.scale) < TOLERANCE and relative_error(own.probs, asft.probs) < TOLERANCE


def test_only_what_it_names_is_asked_for():
    assert not QTargetConfig(method=None, trust="p", residual="policy").objective(has_prior=True).uses_prior
    assert QTargetConfig(method=None, trust="p * r", residual="policy").objective(has_prior=True).uses_prior
    assert QTargetConfig(method=None, trust="p", residual="policy", scale="log_r").objective(has_prior=True).uses_prior
    assert QTargetConfig(method=None, trust="p", residual="policy", scale="weight").uses_token_weights


def test_numbers_at_the_edge_of_probability():
    """A probability that has underflowed still has a logarithm, and zero divides nothing."""
    weight = torch.tensor([[0.0, 0.0], [-300.0, -50.0], [-700.0, -60.0]])  # columns are the logits of two tokens
    labels = torch.tensor([1, 0])

    def trust(text: str) -> list[float]:
        config = QTargetConfig(method=None, trust=text, residual="policy")
        return linear_qtarget_loss(torch.eye(2), weight, labels, config).trust.tolist()

    assert trust("p ** 0.01") == pytest.approx([torch.tensor(-3.0).exp().item(), 1.0], rel=1e-6)
    assert trust("log(p) / -300") == pytest.approx([1.0, 0.0], rel=1e-6)
    assert trust("p / p") == [1.0, 1.0]
    assert trust("0 / (p - p)") == [0.0, 0.0]
    assert trust("log(p - p)") == trust("log(0)")
    assert all(map(torch.isfinite, torch.tensor(trust("(p - p) ** -0.5"))))


def test_it_is_saved_and_read(tmp_path):
    config = QTargetConfig(method=None, trust="p ** alpha * (1 - r)", residual="guided", scale="1 + H", alpha=0.5)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "qtarget_config.json").read_text())["trust"] == "p ** alpha * (1 - r)"
    assert QTargetConfig.from_pretrained(tmp_path) == config
    formula = Formula("p ** alpha")
    for copied in (pickle.loads(pickle.dumps(formula)), copy.deepcopy(formula)):
        assert (copied.text, copied.knobs, copied.names) == (formula.text, formula.knobs, formula.names)


def test_knobs_of_a_formula_have_no_default():
    with pytest.raises(ValueError, match=r"`alpha` has no value: `trust='p \*\* alpha'`"):
        QTargetConfig(method=None, trust="p ** alpha", residual="policy")
    with pytest.raises(ValueError, match="`tau` is not used by"):
        QTargetConfig(method=None, trust="p ** alpha", residual="policy", alpha=1.0, tau=0.1)


HOSTILE = {
    "__import__('os').system('true')": "is not allowed in it",
    "p.real": "`p.real` is not allowed in it",
    "p.__class__": "is not allowed in it",
    "[p for p in r]": "is not allowed in it",
    "(lambda: 1)()": "is not allowed in it",
    "open": "is unknown",
    "open('x')": "`open` is not known",
    "eval('1')": "`eval` is not known",
    "9 ** 9 ** 9": "needs a plain number up to 100 as its exponent",
    "p ** 1000": "needs a plain number up to 100 as its exponent",
    "p ** -1000": "needs a plain number up to 100 as its exponent",
    "1e400": "beyond 1e+06",
    "9" * 400: "beyond 1e+06",
    "-" * 100 + "p": "nested more than 30 deep",
    "(" * 400 + "p" + ")" * 400: "more than 500",
    "p" + " + p" * 40: "nested more than 30 deep",
    "p" * 10_000: "it has 10000 characters, more than 500",
    "p + " * 2_500 + "p": "it has 10001 characters, more than 500",
    "p p": "invalid syntax",
    "": "invalid syntax",
    "p\x00": "null byte",
    "True + p": "`True` is no number",
    "'p' + p": "`'p'` is no number",
    "p if r else H": "use `where`",
    "p > 0 and r > 0": "Multiply conditions for `and`",
    "min(*p)": "`min` takes at least 2 arguments, not 1",
    "exp(p, 1)": "`exp` takes 1 argument, not 2",
    "exp(p, x=1)": "is not allowed in it",
    "p[0]": "is not allowed in it",
    "p := 1": "invalid syntax",
    "p % 2": "is not allowed in it",
    "f'{p}'": "is not allowed in it",
    "1j * p": "`1j` is no number",
    "log + p": "`log` is a function: write `log(...)`",
    "prob * 2": "`prob` is not known.",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
@pytest.mark.parametrize("argument", ["trust", "scale"])
def test_what_is_no_formula_is_refused(text, argument):
    if argument == "scale" and text.isidentifier():
        pytest.skip("a name alone is a design's, for a trust")
    with pytest.raises(ValueError) as refusal:
        QTargetConfig(method=None, **{"trust": "one", "residual": "policy", argument: text})
    assert HOSTILE[text] in str(refusal.value) and f"`{argument}=" in str(refusal.value)
    assert len(str(refusal.value)) < 1_500


def test_refusal_lists_what_is_known():
    with pytest.raises(ValueError) as refusal:
        Formula("q + 1")
    assert all(name in str(refusal.value) for name in KNOWN)


@pytest.mark.parametrize("trust", ["r", "r > 0.1", "where(r > 0.1, 1, 0.5)", "min(1, r / 0.1) * (1 - (log_r < -2))"])
def test_a_prior_that_is_no_distribution_is_seen(trust):
    # A comparison with NaN is neither true nor false: it must not turn into a trust of 0 or 1.
    logits, prior_logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    prior_logits[1] = -math.inf
    losses = qtarget_loss(
        logits,
        torch.tensor([0, 1, 2]),
        QTargetConfig(None, trust=trust, residual="policy"),
        prior_logits=prior_logits,
        reduction="none",
    )
    assert losses.isnan().tolist() == [False, True, False]
