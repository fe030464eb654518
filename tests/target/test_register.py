"""Designs of one's own: by name in configurations, in the fused loss, in files and in messages, like built-in ones."""

import math
from functools import partial
from typing import Annotated

import postponed
import pytest
import torch
from designs import POLICY_SHARES, free_combination
from formulas import importance, log_p, of_label
from problems import make_problem, relative_error

from trl_qtarget import (
    QTargetConfig,
    build_target,
    linear_qtarget_loss,
    qtarget_loss,
    register_residual,
    register_trust,
)
from trl_qtarget.target.registry import Positive, Range, Unit
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


TOLERANCE, FLOOR = 1e-12, 1e-2  # as in test_exactness


@pytest.fixture(autouse=True)
def clean_shelves():
    """Takes the designs of a test off the shelves again."""
    before = dict(TRUSTS), dict(RESIDUALS)
    yield
    for shelf, designs in zip((TRUSTS, RESIDUALS), before, strict=True):
        shelf.clear()
        shelf.update(designs)


def assert_exact(formula, config: QTargetConfig, prior: bool, **knobs) -> None:
    """Dense and fused loss, and their gradients, equal a formula written without the package."""
    for shape, head, chunk_tokens in (((13, 37, 6, 1), "plain", 4), ((29, 101, 17, 2), "capped", None)):
        problem = make_problem(*shape, head=head)
        config.chunk_tokens = chunk_tokens
        logits = problem.logits().detach().requires_grad_()
        published = problem.per_token(formula, logits, prior, **knobs)
        losses = qtarget_loss(logits, problem.labels, config, reduction="none", **problem.dense_arguments(prior))
        assert relative_error(losses, published) < TOLERANCE
        ways = [torch.autograd.grad(value.sum(), logits)[0] for value in (losses, published)]
        assert relative_error(*ways, FLOOR) < TOLERANCE

        leaves = problem.leaves()
        published = problem.per_token(formula, problem.logits(*leaves), prior, **knobs)
        truth = torch.autograd.grad(published.sum() / problem.scored.sum(), leaves)
        arguments = {**problem.linear_arguments(prior), "bias": leaves[2]}
        output = linear_qtarget_loss(*leaves[:2], problem.labels, config, **arguments)
        assert relative_error(output.token_loss, published) < TOLERANCE
        for gradient, true in zip(torch.autograd.grad(output.loss, leaves), truth, strict=True):
            assert relative_error(gradient, true, FLOOR) < TOLERANCE


# --- taking part ---


def test_a_trust_by_decorator():
    @register_trust("root")
    def root(tile):
        """γ = the square root of p_y."""
        return tile.label_probs.sqrt()

    assert root.__name__ == "root" and TRUSTS["root"].summary == "γ = the square root of p_y."
    config = QTargetConfig(None, trust="root", residual="policy")
    assert config.knobs == {}
    assert_exact(
        free_combination(lambda x, p: p.sqrt(), lambda x: x.log_probs.exp(), POLICY_SHARES["policy"]), config, False
    )


def test_a_trust_by_call_with_a_knob():
    def focal(tile, *, beta: Positive = 2.0):
        return (1 - tile.label_probs) ** beta

    assert register_trust("focal", focal) is focal
    assert register_trust("focal", focal) is focal  # again the same: as when a module is imported twice
    uniform = lambda x: torch.full_like(x.log_probs, 1 / x.log_probs.size(-1))  # noqa: E731
    formula = free_combination(lambda x, p, *, beta=2.0: (1 - p) ** beta, uniform)
    config = QTargetConfig(None, trust="focal", residual="uniform")
    assert config.knobs == {"beta": 2.0}
    assert_exact(formula, config, False)
    assert_exact(formula, QTargetConfig(None, trust="focal", residual="uniform", beta=0.5), False, beta=0.5)


def test_a_trust_of_the_tile_statistics():
    @register_trust("certain", uses_prior=True)
    def certain(tile, *, lam: Unit = 0.3):
        certainty = 1 - tile.policy.entropy / math.log(tile.log_probs.size(-1))
        return lam * certainty + (1 - lam) * tile.prior_label_log_probs.exp()

    def formula(x, p, *, lam=0.3):
        certainty = 1 - torch.special.entr(x.log_probs.exp()).sum(-1) / math.log(x.log_probs.size(-1))
        return lam * certainty + (1 - lam) * of_label(log_p(x.prior_logits), x.labels).exp()

    guided = lambda x, *, eta=0.5: ((1 - eta) * x.log_probs + eta * log_p(x.prior_logits)).softmax(-1)  # noqa: E731
    config = QTargetConfig(None, trust="certain", residual="guided", lam=0.6, eta=0.2)
    assert_exact(free_combination(formula, guided), config, True, lam=0.6, eta=0.2)


def test_a_trust_of_whole_sequences():
    @register_trust("sequence_probability", per_sequence=True)
    def sequence_probability(labels, *, alpha: Positive = 1.0):
        return (alpha * labels.sequence_mean(labels.label_log_probs)).exp()

    def formula(x, p, *, alpha=1.0):
        return importance(of_label(x.log_probs, x.labels), x.sequence_ids, alpha, math.inf)

    policy = lambda x: x.log_probs.exp()  # noqa: E731
    own = free_combination(formula, policy, POLICY_SHARES["policy"])
    for alpha in (1.0, 0.4):
        config = QTargetConfig(None, trust="sequence_probability", residual="policy", alpha=alpha)
        for prior in (False, True):
            assert_exact(own, config, prior, alpha=alpha)
    # With a residual that has a prior, in the same batch.
    config = QTargetConfig(None, trust="sequence_probability", residual="prior", temperature=2.0)
    teacher = lambda x, *, temperature=1.0: (x.prior_logits / temperature).softmax(-1)  # noqa: E731
    assert_exact(free_combination(formula, teacher), config, True, temperature=2.0)


def test_a_trust_of_whole_sequences_reads_weights_and_prior():
    @register_trust("weighted_sequence", per_sequence=True, uses_prior=True, uses_token_weights=True)
    def weighted_sequence(labels):
        return labels.sequence_mean(labels.token_weights * labels.label_probs * labels.prior_label_log_probs.exp())

    def formula(x, p):
        values = x.token_weights * p * of_label(x.prior_logits.softmax(-1), x.labels)
        return torch.stack([values[x.sequence_ids == one].mean() for one in x.sequence_ids])

    config = QTargetConfig(None, trust="weighted_sequence", residual="policy")
    assert config.uses_token_weights
    assert_exact(free_combination(formula, lambda x: x.log_probs.exp(), POLICY_SHARES["policy"]), config, True)


def test_a_residual_by_decorator_with_a_knob():
    @register_residual("tempered")
    def tempered(tile, *, temperature: Positive = 2.0):
        return torch.log_softmax(tile.log_probs / temperature, dim=-1)

    def formula(x, *, temperature=2.0):
        return (x.log_probs / temperature).softmax(-1)

    own = free_combination(lambda x, p: p, formula)
    assert_exact(own, QTargetConfig(None, trust="probability", residual="tempered"), False)
    config = QTargetConfig(None, trust="probability", residual="tempered", temperature=0.7)
    assert_exact(own, config, False, temperature=0.7)


def test_a_residual_with_a_prior():
    @register_residual("average", uses_prior=True)
    def average(tile, *, lam: Unit = 0.5):
        prior = torch.log_softmax(tile.prior_logits, dim=-1)
        return torch.logaddexp(tile.log_probs + math.log(1 - lam), prior + math.log(lam))

    def formula(x, *, lam=0.5):
        return (1 - lam) * x.log_probs.exp() + lam * x.prior_logits.softmax(-1)

    own = free_combination(lambda x, p, *, tau=0.1: (p > tau).double(), formula)
    config = QTargetConfig(None, trust="threshold", residual="average", lam=0.2, tau=0.05)
    assert_exact(own, config, True, lam=0.2, tau=0.05)
    # Without another model the policy is the prior, and the average of a distribution with itself is itself.
    assert_exact(own, config, False, lam=0.2, tau=0.05)
    needs = QTargetConfig(None, trust="one", residual="average", prior="base")
    with pytest.raises(ValueError, match=r"`trust='one'`, `residual='average'` needs a prior and none is given"):
        qtarget_loss(torch.zeros(2, 3), torch.tensor([0, 1]), needs)


def test_a_residual_of_two_measures_and_the_embeddings():
    @register_residual("two", uses_embeddings=True)
    def two(tile, *, beta: Positive = 0.5):
        scores = (tile.embeddings @ tile.embeddings.sum(0)).expand_as(tile.log_probs)
        return torch.log_softmax(scores, dim=-1), torch.log_softmax(tile.log_probs / beta, dim=-1)

    def own(logits, labels, prior_logits, token_weights, sequence_ids, *, embeddings):
        log_probs = log_p(logits)
        p = of_label(log_probs.exp(), labels).detach()
        plus = (embeddings @ embeddings.sum(0)).softmax(-1)
        minus = (log_probs.detach() / 0.5).softmax(-1)
        # CE(π̃⁺, p) has a gradient here, unlike that of the policy, so it stays in the value.
        return -p * of_label(log_probs, labels) - ((plus - p[:, None] * minus) * log_probs).sum(-1)

    assert_exact(own, QTargetConfig(None, trust="probability", residual="two"), False)


def test_a_zero_of_the_residual_is_the_lowest_number():
    @register_residual("first_half")
    def first_half(tile):
        size = tile.log_probs.size(-1) // 2
        log_probs = torch.full_like(tile.log_probs, torch.finfo(tile.log_probs.dtype).min)
        log_probs[:, :size] = -math.log(size)
        return log_probs

    def formula(x):
        size = x.log_probs.size(-1) // 2
        return (torch.arange(x.log_probs.size(-1)) < size).double().expand_as(x.log_probs) / size

    assert_exact(
        free_combination(lambda x, p: p, formula),
        QTargetConfig(None, trust="probability", residual="first_half"),
        False,
    )


def test_target_and_statistics_of_own_designs():
    register_trust("twice", lambda tile: 2 * torch.ones_like(tile.label_probs))
    problem = make_problem(13, 37, 6, 3)
    config = QTargetConfig(None, trust="twice", residual="policy")
    target = build_target(problem.logits(), problem.labels, config)
    assert ((target.probs.sum(-1) - 1).abs() < TOLERANCE).all() and (target.probs < 0).any()
    output = linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config, bias=problem.bias)
    assert (output.trust[problem.scored] == 2).all() and output.kl[problem.scored].isnan().all()


def test_a_trust_may_return_another_dtype():
    register_trust("rare", lambda tile: tile.label_probs < 0.3)
    formula = free_combination(lambda x, p: (p < 0.3).double(), lambda x: x.log_probs.exp(), POLICY_SHARES["policy"])
    assert_exact(formula, QTargetConfig(None, trust="rare", residual="policy"), False)


@pytest.mark.parametrize("way", ["dense", "fused"])
def test_a_trust_that_asks_a_tile_for_whole_sequences(way):
    # A tile of the fused loss is a block of tokens: the mean over it would be silently wrong.
    @register_trust("undeclared")
    def undeclared(tile):
        return tile.sequence_mean(tile.label_probs)

    problem = make_problem(13, 37, 6, 6)
    config = QTargetConfig(None, trust="undeclared", residual="policy", chunk_tokens=4)
    message = r"`sequence_mean` is not known to a tile.*: register the trust with `per_sequence=True`"
    with pytest.raises(ValueError, match=message):
        if way == "dense":
            qtarget_loss(problem.logits(), problem.labels, config, **problem.dense_arguments())
        else:
            linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config, **problem.linear_arguments())


def test_a_residual_that_reads_the_token_weights():
    @register_residual("weighted", uses_token_weights=True)
    def weighted(tile):
        return torch.log_softmax(tile.log_probs * tile.token_weights[:, None], dim=-1)

    config = QTargetConfig(None, trust="probability", residual="weighted")
    assert config.uses_token_weights
    formula = lambda x: (x.log_probs * x.token_weights[:, None]).softmax(-1)  # noqa: E731
    assert_exact(free_combination(lambda x, p: p, formula), config, False)
    with pytest.raises(ValueError, match=r"`token_weights` is missing: the residual 'weighted' reads one weight"):
        qtarget_loss(torch.zeros(2, 3), torch.tensor([0, 1]), config)


# --- files and messages ---


def test_files_hold_own_designs(tmp_path):
    @register_trust("focal")
    def focal(tile, *, beta: Annotated[float, Range(1, 3)] = 2.0):
        return (1 - tile.label_probs) ** beta

    config = QTargetConfig(None, trust="focal", residual="uniform", beta=1.5)
    config.save_pretrained(tmp_path)
    assert QTargetConfig.from_pretrained(tmp_path) == config
    del TRUSTS["focal"]
    with pytest.raises(ValueError, match=r"`trust='focal'` is unknown.*Register your own with `register_trust`"):
        QTargetConfig.from_pretrained(tmp_path)


def test_knobs_of_own_designs_are_checked():
    @register_trust("focal")
    def focal(tile, *, beta: Annotated[float, Range(1, 3)] = 2.0, lam=0.5):
        return (1 - tile.label_probs) ** beta * lam

    with pytest.raises(ValueError, match=r"`beta=0.5` is out of range: it must be a number in \[1, 3\]"):
        QTargetConfig(None, trust="focal", residual="policy", beta=0.5)
    with pytest.raises(ValueError, match=r"`lam=inf` is out of range: it must be a number that is finite"):
        QTargetConfig(None, trust="focal", residual="policy", lam=math.inf)
    with pytest.raises(ValueError, match=r"`eta` is not used by `trust='focal'`.* whose knobs are: beta, lam"):
        QTargetConfig(None, trust="focal", residual="policy", eta=0.5)
    assert QTargetConfig(None, trust="focal", residual="policy", lam=-7.5).knobs == {"beta": 2.0, "lam": -7.5}


@pytest.mark.parametrize(("register", "kind"), [(register_trust, "trust"), (register_residual, "residual")])
def test_a_design_that_cannot_be_registered(register, kind):
    taken = "one" if kind == "trust" else "policy"
    with pytest.raises(ValueError, match=rf"`{kind}='{taken}'` is registered already: choose another name"):
        register(taken, lambda tile: tile.label_probs)
    with pytest.raises(ValueError, match=rf"`{kind}='{taken}'` is registered already"):
        register(taken)(lambda tile: tile.label_probs)
    for name in ("", None, 3):
        with pytest.raises(ValueError, match=r"`name` must be a non-empty string, got "):
            register(name, lambda tile: tile.label_probs)

    def strange(tile, *, gamma=1.0):
        return tile.label_probs * gamma

    def without_default(tile, *, lam):
        return tile.label_probs * lam

    with pytest.raises(ValueError, match=r"`gamma` is not a knob that `QTargetConfig` has: name .* eta, alpha, tau"):
        register("strange", strange)
    with pytest.raises(ValueError, match=r"`lam` of `without_default` has no default: give it one"):
        register("without_default", without_default)
    assert "strange" not in TRUSTS | RESIDUALS and "without_default" not in TRUSTS | RESIDUALS


@pytest.mark.parametrize("design", [postponed.focal, postponed.Focal(), partial(postponed.focal)], ids=type)
def test_annotations_that_are_strings(design):
    register_trust("postponed", design)
    assert QTargetConfig(None, trust="postponed", residual="policy").knobs == {"beta": 2.0}
    with pytest.raises(ValueError, match=r"`beta=0` is out of range: it must be a number > 0"):
        QTargetConfig(None, trust="postponed", residual="policy", beta=0)


@pytest.mark.parametrize("register", [register_trust, register_residual])
def test_an_annotation_that_cannot_be_resolved(register):
    message = (
        r"`lam` of `unresolved` has the annotation 'Unit', which cannot be resolved .*: import its names at the top"
    )
    with pytest.raises(ValueError, match=message):
        register("unresolved", postponed.unresolved)
    assert "unresolved" not in TRUSTS | RESIDUALS


def test_properties_that_a_design_cannot_have():
    wrong = {
        register_trust: ("uses_priors", "uses_embeddings", "is_policy", "name_"),
        register_residual: ("uses_priors", "per_sequence"),
    }
    for register, names in wrong.items():
        kind = "trust" if register is register_trust else "residual"
        for name in names:
            message = rf"`{name}` is no property of a {kind}: `register_{kind}` takes uses_prior, "
            for design in (lambda tile: tile.log_probs, None):  # by call and as a decorator
                with pytest.raises(ValueError, match=message):
                    register("wrong", design, **{name: True})
    assert "wrong" not in TRUSTS | RESIDUALS


def test_other_values_are_bound_with_partial():
    # The remedy that the message about an unknown knob names.
    def shifted(offset, tile):
        return tile.label_probs * 0 + offset

    register_trust("shifted", partial(shifted, 0.25))
    problem = make_problem(13, 37, 6, 4)
    config = QTargetConfig(None, trust="shifted", residual="policy")
    output = linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config)
    assert (output.trust[problem.scored] == 0.25).all()


def test_a_bound_keyword_is_no_knob():
    def raised(tile, *, exponent):
        return tile.label_probs**exponent

    register_trust("raised", partial(raised, exponent=0.5))
    assert QTargetConfig(None, trust="raised", residual="policy").knobs == {}


def test_a_shared_knob_has_to_suit_both_designs():
    @register_trust("steered")
    def steered(tile, *, eta: Positive = 2.0):
        return tile.label_probs**eta

    # `guided` takes eta in [0, 1]: 1.5 suits one of the two designs only.
    with pytest.raises(ValueError, match=r"`eta=1.5` is out of range"):
        QTargetConfig(None, trust="steered", residual="guided", eta=1.5)


# --- results of the wrong shape ---


@pytest.mark.parametrize("way", ["dense", "fused"])
def test_a_result_of_the_wrong_shape(way):
    register_trust("scalar", lambda tile: tile.label_probs.mean())
    register_trust("column", lambda tile: tile.label_probs[:, None])
    register_trust("per_sequence_scalar", lambda labels: labels.label_probs.mean(), per_sequence=True)
    register_residual("one_row", lambda tile: tile.log_probs.mean(0))
    problem = make_problem(13, 37, 6, 5)

    def evaluate(**designs):
        config = QTargetConfig(None, **designs)
        if way == "dense":
            qtarget_loss(problem.logits(), problem.labels, config)
        else:
            linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config)

    for trust in ("scalar", "column", "per_sequence_scalar"):
        with pytest.raises(ValueError, match=rf"`trust='{trust}'` returned shape .*: a trust returns one number"):
            evaluate(trust=trust, residual="policy")
    with pytest.raises(ValueError, match=r"`residual='one_row'` returned shape \[37\], not "):
        evaluate(trust="one", residual="one_row")


def test_an_integer_that_no_float_holds_is_in_no_range():
    assert 10**400 not in Range() and 10**308 in Range()
