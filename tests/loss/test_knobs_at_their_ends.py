"""Knobs near the ends of their range: zero stays zero, and a value tends to what it is at the end."""

import math

import pytest
import torch
from designs import TRUST_FORMULAS, free_formula
from formulas import FORMULAS, guide, log_p
from problems import make_problem
from test_exactness import check_dense, check_linear

from trl_qtarget import QTargetConfig, build_target, linear_qtarget_loss, qtarget_loss
from trl_qtarget.target.tile import Tile, finite


# As in `registry.Unit`: every number in [0, 1] is allowed.
NEAR_ZERO = [5e-324, 1e-300, 1e-46, 1e-40, 1e-31, 1e-20, 1e-12, 0.9e-6, 1.1e-6]
NEAR_ONE = [1 - 1e-6, 1 - 1e-7, 1 - 1e-8, 1 - 1e-9, 1 - 2**-53]
KERNELS = ["torch", "triton"]
# Of the numbers compared: float32 rounds shares, logarithms and sums by some of its 1.2e-7.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}
MASKED, PRIOR_MASKED = 4, 5


def masked_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of policy and prior, each without another token."""
    generator = torch.Generator().manual_seed(3)
    logits, prior_logits = 2 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    logits[:, MASKED], prior_logits[:, PRIOR_MASKED] = -math.inf, -math.inf
    return logits.to(dtype), prior_logits.to(dtype)


def targets(config: QTargetConfig, logits: torch.Tensor, prior_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Q `[n, V]` by the dense function, and by both kernels from the gradient p - Q over a bias."""
    labels = torch.zeros(len(logits), dtype=torch.long)
    found = {"dense": build_target(logits, labels, config, prior_logits=prior_logits).probs}
    p = logits.softmax(-1)
    for kernel in KERNELS:
        if kernel == "triton":
            pytest.importorskip("triton")
        rows = []
        for row, prior_row in zip(logits, prior_logits, strict=True):
            bias, zero = row.clone().requires_grad_(), torch.zeros(1, 2, dtype=row.dtype)
            weight = zero.expand(len(row), 2)
            prior = {"prior_hidden": zero, "prior_weight": weight, "prior_bias": prior_row}
            given = QTargetConfig(**{**config.to_dict(), "kernel": kernel})
            output = linear_qtarget_loss(zero, weight, labels[:1], given, bias=bias, **prior)
            assert torch.isfinite(output.token_loss).all()
            rows.append(torch.autograd.grad(output.loss, bias)[0])
        found[kernel] = p - torch.stack(rows)
    return found


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("eta", [*NEAR_ZERO, 0.5, *NEAR_ONE])
def test_guided_has_no_mass_where_policy_or_prior_has_none(eta, dtype):
    logits, prior_logits = masked_logits(dtype)
    config = QTargetConfig(None, trust="zero", residual="guided", eta=eta)
    expected = guide(log_p(logits.double()), log_p(prior_logits.double()), eta)
    assert (expected[:, [MASKED, PRIOR_MASKED]] == 0).all()
    for name, probs in targets(config, logits, prior_logits).items():
        assert (probs - expected).abs().max() <= ROUNDING[dtype], name
        assert (probs[:, MASKED] == 0).all() and (probs[:, PRIOR_MASKED].abs() <= ROUNDING[dtype]).all(), name


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("temperature", [1e-310, 1e-46, 1e-40, 0.5, 0.9e6, 1.1e6, 1e12, 1e31, 3.3e38])
@pytest.mark.parametrize("method", ["distill", "gem"])
def test_any_temperature_leaves_a_masked_token_without_mass(method, temperature, dtype):
    logits, prior_logits = masked_logits(dtype)
    name = "beta" if method == "gem" else "temperature"
    config = QTargetConfig(method, **{name: temperature})
    tempered = logits if method == "gem" else prior_logits
    distance = (tempered - tempered.amax(-1, keepdim=True)).double()
    expected = log_p(torch.where(distance == 0, 0.0, distance / temperature)).exp()
    if method == "gem":
        label = torch.eye(7, dtype=torch.float64)[torch.zeros(3, dtype=torch.long)]
        expected = label + logits.double().softmax(-1) - expected
    for way, probs in targets(config, logits, prior_logits).items():
        assert (probs - expected).abs().max() <= ROUNDING[dtype], way


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shares", [(1e-40, 1e-9), (1e-9, 3.0), (1e9, 1e-9), (2e6, 1.0), (1.0, 1e-7), (0.3, 0.3)])
def test_mixtures_of_any_shares(shares, dtype):
    # As a residual of one's own may ask for: the shares need not add up to one.
    logits, prior_logits = masked_logits(dtype)
    tile = Tile(finite(logits.log_softmax(-1)), torch.zeros(3, dtype=torch.long), finite(prior_logits))
    measure = tile.mixture(*shares)
    policy, prior = log_p(logits.double()), log_p(prior_logits.double())
    expected = log_p(shares[0] * policy + shares[1] * prior).exp()
    assert (measure.probs - expected).abs().max() <= ROUNDING[dtype] * max(1.0, *shares)
    assert torch.isfinite(measure.log_probs).all() and torch.isfinite(measure.entropy).all()
    assert (measure.probs[:, [MASKED, PRIOR_MASKED]] == 0).all()


# --- gem at beta = 1 ---


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("beta", [1 - 1e-9, 1.0, 1 + 1e-9])
def test_gem_has_its_published_value_at_beta_1(beta, kernel):
    knobs = {"beta": beta}
    config = QTargetConfig("gem", kernel=kernel, **knobs)
    for head in ("plain", "capped"):
        check_linear(make_problem(13, 37, 6, 1, head=head), FORMULAS["gem"], config, knobs)
        check_dense(make_problem(13, 37, 6, 1, head=head), FORMULAS["gem"], config, knobs)


def test_gem_at_beta_1_is_nll_minus_entropy():
    problem = make_problem(13, 37, 6, 1)
    output = linear_qtarget_loss(
        problem.hidden, problem.weight, problem.labels, QTargetConfig("gem", beta=1.0), bias=problem.bias
    )
    assert (output.token_loss - (output.nll - output.entropy)).abs().max() < 1e-13
    assert (output.kl - output.nll).abs().max() < 1e-13  # Q is the label itself there, with no negative entry


@pytest.mark.parametrize("trust", TRUST_FORMULAS)
def test_sharpened_by_nothing_with_any_trust(trust):
    for kernel in KERNELS:
        config = QTargetConfig(None, trust=trust, residual="sharpened", beta=1.0, kernel=kernel)
        problem = make_problem(13, 37, 6, 1)
        check_linear(problem, free_formula(trust, "sharpened"), config, {"beta": 1.0})
        check_dense(problem, free_formula(trust, "sharpened"), config, {"beta": 1.0})


# --- beyond_log near alpha = 0 ---


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-50, 1e-45, 1e-40, 1e-30, 1e-12])
def test_beyond_log_tends_to_the_nll_in_every_dtype(alpha, dtype):
    logits, labels = masked_logits(dtype)[0], torch.tensor([0, 1, 2])
    losses = qtarget_loss(logits, labels, QTargetConfig("beyond_log", alpha=alpha), reduction="none")
    expected = qtarget_loss(logits.double(), labels, "sft", reduction="none")
    # (1 - p^alpha)/alpha = NLL (1 - alpha NLL/2 + ...), and NLL is below 10 here.
    assert ((losses - expected).abs() <= (10 * alpha + ROUNDING[dtype]) * expected).all()


@pytest.mark.parametrize("alpha", [1e-300, 1e-40, 1e-12, 0.5])
def test_a_power_of_zero_is_zero(alpha):
    logits, labels = masked_logits(torch.float32)[0], torch.full((3,), MASKED)
    config = QTargetConfig(None, trust="power", residual="uniform", alpha=alpha)
    target = build_target(logits, labels, config)
    assert torch.equal(target.probs, torch.full((3, 7), 1 / 7))
