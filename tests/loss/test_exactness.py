"""Every method and every free combination equals its published formula, in float64, dense and fused."""

import math

import pytest
import torch
from designs import OTHER_DESIGN_KNOBS, RESIDUAL_FORMULAS, SOME_PAIRS, TRUST_FORMULAS, free_formula, knobs_in
from formulas import FORMULAS, OTHER_KNOBS
from measured import CLOSED
from problems import HEADS, Problem, make_problem, relative_error
from thinned import thinned

from trl_qtarget import METHODS, QTargetConfig, build_target, induced_target, linear_qtarget_loss, qtarget_loss
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


# Two float64 evaluations of one formula in another order: a few hundred roundings of 1.1e-16, on quantities that grow
# to some hundreds of nats in the confident rows.
TOLERANCE = 1e-12
# A gradient s (p - Q) is a difference of probabilities, and a loss one of logits: where it (nearly) vanishes, the
# rounding of some dozens of them remains, a part in 1e12 of this floor.
FLOOR = 1e-2


# (tokens, vocabulary, width, seed)
SHAPES = [(1, 11, 5, 0), (13, 37, 6, 1), (29, 101, 17, 2)]

METHOD_CASES = [(name, knobs) for name in FORMULAS for knobs in ({}, *OTHER_KNOBS.get(name, []))]
FREE_CASES = [(trust, residual) for trust in TRUST_FORMULAS for residual in RESIDUAL_FORMULAS]


def case_id(value) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else str(value)


def free_knobs(trust: str, residual: str) -> dict[str, float]:
    """Knobs of both designs, all other than their defaults."""
    names = knobs_in(TRUST_FORMULAS[trust]) | knobs_in(RESIDUAL_FORMULAS[residual])
    return {name: OTHER_DESIGN_KNOBS[name] for name in sorted(names)}


def check_dense(problem: Problem, formula, config: QTargetConfig, knobs: dict, prior: bool = True) -> None:
    """Value, gradient, target and induced target on dense logits equal those of the formula."""
    logits = problem.logits().detach().requires_grad_()
    published = problem.per_token(formula, logits, prior, **knobs)
    (gradient,) = torch.autograd.grad(published.sum(), logits)
    arguments = problem.dense_arguments(prior)

    losses = qtarget_loss(logits, problem.labels, config, reduction="none", **arguments)
    assert relative_error(losses, published, FLOOR) < TOLERANCE
    (own,) = torch.autograd.grad(losses.sum(), logits)
    assert relative_error(own, gradient, FLOOR) < TOLERANCE

    target = build_target(logits, problem.labels, config, **arguments)
    assert not target.probs.requires_grad and not target.scale.requires_grad
    p = logits.detach().softmax(-1)
    assert relative_error(target.scale[:, None] * (p - target.probs), gradient, FLOOR) < TOLERANCE
    # A row sums up to V numbers; trust reaches 16 in `importance`, so its rounding does as well.
    largest = target.probs.abs().sum(-1).clamp(min=1)
    assert ((target.probs.sum(-1) - 1).abs() <= 1e-15 * logits.size(1) * largest).all()

    induced = induced_target(lambda z, _: problem.per_token(formula, z, prior, **knobs), logits, problem.labels)
    assert relative_error(induced, p - gradient) < TOLERANCE
    assert relative_error(induced, p - target.scale[:, None] * (p - target.probs)) < TOLERANCE


def check_linear(problem: Problem, formula, config: QTargetConfig, knobs: dict, prior: bool = True) -> None:
    """Loss, per-token losses and the gradients of hidden, weight and bias equal those of the formula."""
    leaves = problem.leaves()
    published = problem.per_token(formula, problem.logits(*leaves), prior, **knobs)
    mean = published.sum() / problem.scored.sum().clamp(min=1)
    truth = torch.autograd.grad(mean, leaves)
    leaves = problem.leaves()
    output = linear_qtarget_loss(
        leaves[0], leaves[1], problem.labels, config, bias=leaves[2], **problem.linear_arguments(prior)
    )
    assert relative_error(output.token_loss, published, FLOOR) < TOLERANCE
    assert relative_error(output.loss, mean, FLOOR) < TOLERANCE
    for gradient, true in zip(torch.autograd.grad(output.loss, leaves), truth, strict=True):
        assert relative_error(gradient, true, FLOOR) < TOLERANCE


def test_every_name_has_its_formula():
    # A new method or design has to bring its formula here, and is then held to it below.
    assert set(FORMULAS) == set(CLOSED), "others are a free combination: test_identities.py"
    assert set(TRUST_FORMULAS) == set(TRUSTS)
    assert set(RESIDUAL_FORMULAS) == set(RESIDUALS)
    assert {name for name in CLOSED if METHODS[name].knobs} == set(OTHER_KNOBS)


@pytest.mark.parametrize(("name", "knobs"), METHOD_CASES, ids=case_id)
def test_method_dense(name, knobs):
    for shape in SHAPES:
        check_dense(make_problem(*shape), FORMULAS[name], QTargetConfig(name, **knobs), knobs)


@pytest.mark.parametrize(("name", "knobs"), METHOD_CASES, ids=case_id)
def test_method_linear(name, knobs):
    for shape in SHAPES:
        for head, chunk_tokens in zip(HEADS, (None, 1, 5), strict=True):
            config = QTargetConfig(name, chunk_tokens=chunk_tokens, **knobs)
            check_linear(make_problem(*shape, head=head), FORMULAS[name], config, knobs)


@pytest.mark.parametrize(("trust", "residual"), thinned(FREE_CASES, lambda *pair: pair in SOME_PAIRS))
def test_free_combination_dense(trust, residual):
    for knobs in ({}, free_knobs(trust, residual)):
        config = QTargetConfig(method=None, trust=trust, residual=residual, **knobs)
        for shape in SHAPES:  # a knob that both designs have is one number for both
            check_dense(make_problem(*shape), free_formula(trust, residual), config, config.knobs)


@pytest.mark.parametrize(("trust", "residual"), thinned(FREE_CASES, lambda *pair: pair in SOME_PAIRS))
def test_free_combination_linear(trust, residual):
    for knobs in ({}, free_knobs(trust, residual)):
        for shape, head, chunk_tokens in zip(SHAPES, HEADS, (1, 4, None), strict=True):
            config = QTargetConfig(method=None, trust=trust, residual=residual, chunk_tokens=chunk_tokens, **knobs)
            check_linear(make_problem(*shape, head=head), free_formula(trust, residual), config, config.knobs)


@pytest.mark.parametrize("residual", ["prior", "guided"])
@pytest.mark.parametrize("trust", ["probability", "importance", "clipped_ratio"])
def test_free_combination_with_the_policy_as_its_prior(trust, residual):
    for knobs in ({}, free_knobs(trust, residual)):
        # A tempered prior stays a residual of its own; guided by itself, or at temperature 1, it is the policy.
        is_policy = residual == "guided" or knobs.get("temperature", 1.0) == 1.0
        formula = free_formula(trust, "policy" if is_policy else residual)
        for arguments in ({"prior": "policy"}, {}):
            config = QTargetConfig(method=None, trust=trust, residual=residual, **knobs, **arguments)
            problem = make_problem(13, 37, 6, 3)
            check_dense(problem, formula, config, knobs, prior=False)
            check_linear(problem, formula, config, knobs, prior=False)


def test_bounds_are_where_the_publications_put_them():
    # p_y > tau and r = p_y/π_prior(y) < 1 + epsilon, to within rounding.
    labels = torch.zeros(2, dtype=torch.long)
    step = torch.tensor([-1e-12, 1e-12], dtype=torch.float64)

    def moved(config: QTargetConfig, chance: float, **arguments) -> list[bool]:
        logits = torch.stack([chance + step, 1 - chance - step], dim=1).log()
        target = build_target(logits, labels, config, **arguments)
        return ((target.probs - logits.softmax(-1)).abs().sum(-1) > 0.1).tolist()

    for tau in (0.1, 0.5, 0.85):
        assert moved(QTargetConfig("profit", tau=tau), tau) == [False, True]
    prior_logits = torch.zeros(2, 2, dtype=torch.float64)  # π_prior(y) = 1/2
    for epsilon in (0.28, 0.5):
        assert moved(QTargetConfig("psft", epsilon=epsilon), (1 + epsilon) / 2, prior_logits=prior_logits) == [
            True,
            False,
        ]


@pytest.mark.parametrize("name", ["target_sft", "iw_sft", "gem"])
def test_rows_that_do_not_fit_one_block(name):
    # 4 tokens fill more than one of the blocks that a chunk is worked on in, so all seams are crossed here.
    problem = make_problem(9, 300_007, 3, 4)
    for chunk_tokens in (None, 2):
        check_linear(problem, FORMULAS[name], QTargetConfig(name, chunk_tokens=chunk_tokens), {})


@pytest.mark.parametrize("bias", [False, True])
def test_only_some_inputs_ask_for_a_gradient(bias):
    problem = make_problem(13, 37, 6, 5, bias=bias)
    published = problem.leaves()
    loss = problem.per_token(FORMULAS["target_sft"], problem.logits(*published)).sum() / problem.scored.sum()
    truth = torch.autograd.grad(loss, published)
    for chosen in range(len(truth)):
        leaves = problem.leaves()
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number == chosen)
        arguments = {**problem.linear_arguments(), "bias": leaves[2] if bias else None}
        linear_qtarget_loss(*leaves[:2], problem.labels, "target_sft", **arguments).loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == [number == chosen for number in range(len(leaves))]
        assert relative_error(leaves[chosen].grad, truth[chosen]) < TOLERANCE


def test_the_gradient_is_multiplied_by_the_incoming_one():
    problem = make_problem(13, 37, 6, 6)
    grads = []
    for factor in (1.0, -3.5):
        leaves = problem.leaves()
        output = linear_qtarget_loss(*leaves[:2], problem.labels, "asft", bias=leaves[2], **problem.linear_arguments())
        grads.append(torch.autograd.grad(factor * output.loss, leaves))
    for one, many in zip(*grads, strict=True):
        assert relative_error(many, -3.5 * one) < 1e-15


def test_a_label_that_is_ignored_by_another_number():
    problem = make_problem(13, 37, 6, 7)
    labels = problem.labels.masked_fill(~problem.scored, -1)
    expected = qtarget_loss(problem.logits(), problem.labels, "sft")
    output = linear_qtarget_loss(
        problem.hidden, problem.weight, labels, "sft", bias=problem.bias, ignore_index=-1, **problem.head
    )
    assert relative_error(output.loss, expected) < TOLERANCE
    assert relative_error(qtarget_loss(problem.logits(), labels, "sft", ignore_index=-1), expected) < 1e-15


# Their Q is made of more than the label and one residual.
OF_MORE_PARTS = ("gem", "tofu", "otr", "mask_target", "lp_sft")


@pytest.mark.parametrize("name", FORMULAS)
def test_statistics_of_the_fused_loss(name):
    for shape, head in zip(SHAPES, HEADS, strict=True):
        problem = make_problem(*shape, head=head)
        logits, labels, scored = problem.logits(), problem.labels, problem.scored
        config = QTargetConfig(name, chunk_tokens=4)
        target = build_target(logits, labels, config, **problem.dense_arguments())
        output = linear_qtarget_loss(
            problem.hidden, problem.weight, labels, config, bias=problem.bias, **problem.linear_arguments()
        )
        assert torch.equal(output.scored, scored)
        statistics = ("token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1", "prior_is_top1")
        for statistic in statistics:
            value = getattr(output, statistic)
            assert value.shape == labels.shape and value.dtype == torch.float64 and not value.requires_grad
            assert (value[~scored] == 0).all()

        log_probs, safe = logits.log_softmax(-1), labels.clamp(min=0)[:, None]
        p, q = log_probs.exp(), target.probs
        label_log_probs = log_probs.gather(1, safe).squeeze(1)
        dense = {
            "nll": -label_log_probs,
            "label_mass": q.gather(1, safe).squeeze(1),
            "entropy": -(p * log_probs).sum(-1),
            "is_top1": (log_probs.argmax(-1) == labels).double(),
        }
        for statistic, expected in dense.items():
            assert relative_error(getattr(output, statistic), expected * scored) < TOLERANCE, statistic

        prior_logits = problem.dense_arguments().get("prior_logits")
        if config.objective(has_prior=prior_logits is not None).uses_prior:
            agrees = (prior_logits.argmax(-1) == labels).double()
            assert torch.equal(output.prior_is_top1[scored], agrees[scored])
        else:
            assert output.prior_is_top1[scored].isnan().all()

        # A divergence of nearly equal distributions is a small difference of large sums.
        proper = (q >= 0).all(-1) & scored & (name not in OF_MORE_PARTS)
        expected = (torch.xlogy(q, q) - q * log_probs).sum(-1)
        assert ((output.kl - expected)[proper].abs() < TOLERANCE * (1 + label_log_probs[proper].abs())).all()
        assert torch.equal(output.kl.isnan(), scored & ~proper)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in ("gem", "tofu", "otr")])
def test_trust_statistic_is_the_weight_of_the_label(name):
    # Q = γ δ + (1 - γ) π̃ off the label is (1 - γ) π̃, and π̃ sums to one.
    problem = make_problem(13, 37, 6, 8)
    output = linear_qtarget_loss(
        problem.hidden, problem.weight, problem.labels, name, bias=problem.bias, **problem.linear_arguments()
    )
    rows = problem.scored
    prior = problem.prior_logits().softmax(-1)
    p = problem.logits().softmax(-1)
    policy, guided = p, (p * prior).sqrt() / (p * prior).sqrt().sum(-1, keepdim=True)
    residual = {
        "label_smoothing": torch.full_like(p, 1 / p.size(1)),
        **dict.fromkeys(("sft_kl", "asft", "distill", "distill_hybrid", "gift"), prior),
        "target_sft": guided,
    }.get(name, policy)
    label_residual = residual.gather(1, problem.labels.clamp(min=0)[:, None]).squeeze(1)
    expected = output.trust + (1 - output.trust) * label_residual
    assert relative_error(output.label_mass, expected * rows) < TOLERANCE


def test_of_equally_probable_tokens_the_first_is_top1():
    # As `argmax` has it, and with it TRL's own mean token accuracy.
    hidden, weight = torch.zeros(2, 3), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    output = linear_qtarget_loss(hidden, weight, torch.tensor([4, 0]), "sft")
    assert output.is_top1.tolist() == [0.0, 1.0]
    # float32 rounding of ln 5.
    assert (output.entropy - math.log(5)).abs().max() < 2e-7


def test_reductions():
    problem = make_problem(13, 37, 6, 9)
    arguments = problem.dense_arguments()
    losses, total, mean = (
        qtarget_loss(problem.logits(), problem.labels, "eaft", reduction=reduction, **arguments)
        for reduction in ("none", "sum", "mean")
    )
    assert losses.shape == problem.labels.shape and (losses[~problem.scored] == 0).all()
    assert relative_error(total, losses.sum()) < 1e-15
    assert relative_error(mean, losses.sum() / problem.scored.sum()) < 1e-15
