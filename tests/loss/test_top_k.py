"""A top-k prior: the fused loss equals the dense specification, which is exact over k + 1 events."""

import math
from dataclasses import replace

import pytest
import torch
from problems import HEADS, make_problem, relative_error

from trl_qtarget import (
    QTargetConfig,
    TopKPrior,
    build_target,
    linear_qtarget_loss,
    qtarget_loss,
    register_residual,
)
from trl_qtarget.loss import choice
from trl_qtarget.target.dense import token_target
from trl_qtarget.target.residual import RESIDUALS


TOLERANCE, FLOOR = 1e-12, 1e-2  # as in test_exactness.py
SHAPES = [(1, 11, 5, 0), (13, 37, 6, 1), (29, 101, 17, 2)]
FREE = {"method": None, "residual": "guided"}
TARGETS = {
    "distill": {"method": "distill"},
    "distill_hybrid": {"method": "distill_hybrid"},
    "target_sft": {"method": "target_sft", "eta": 0.3},
    "sft_kl": {"method": "sft_kl"},
    "asft": {"method": "asft"},
    "gift": {"method": "gift"},
    "psft": {"method": "psft"},
    "iw_sft": {"method": "iw_sft"},
    "prift": {"method": "prift"},
    "asft_k3": {"method": "asft_k3"},
    # Statistics of the policy, which has been taken apart.
    "entropy": {**FREE, "trust": "entropy", "top_k": 5},
    "formula": {**FREE, "trust": "r / (rank + margin ** 2 + collision)", "scale": "1 + H * p_max"},
    "sampled": {**FREE, "trust": "sampled", "temperature": 1.5},
    "zeros": {**FREE, "trust": "one", "scale": "p > 0.3"},
}
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(not choice._installed() or not choice._interpreted(), reason="no interpreter")
)


def top_k_of(logits: torch.Tensor, labels: torch.Tensor, k: int, tail: str = "policy") -> TopKPrior:
    """What is known of a prior with these logits."""
    log_probs = logits.log_softmax(-1)
    top = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(1, top.indices, -math.inf).logsumexp(-1)
    return TopKPrior(top.indices, top.values, log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0], rest, tail)


def fused(problem, config: QTargetConfig, prior: TopKPrior):
    """The output, and the gradients of hidden, weight and bias."""
    leaves = problem.leaves()
    head = {name: value for name, value in problem.head.items() if not name.startswith("prior")}
    output = linear_qtarget_loss(
        *leaves[:2],
        problem.labels,
        config,
        bias=leaves[2],
        prior_top_k=prior,
        token_weights=problem.token_weights,
        sequence_ids=problem.sequence_ids,
        **head,
    )
    return output, torch.autograd.grad(output.loss, leaves)


def check_equals_dense(problem, config: QTargetConfig, prior: TopKPrior) -> None:
    arguments = {**problem.dense_arguments(prior=False), "prior_top_k": prior}
    leaves = problem.leaves()
    losses = qtarget_loss(problem.logits(*leaves), problem.labels, config, reduction="none", **arguments)
    truth = torch.autograd.grad(losses.sum() / problem.scored.sum().clamp(min=1), leaves)
    _, target, scored = token_target(problem.logits(), problem.labels, config, None, **arguments)

    output, gradients = fused(problem, config, prior)
    assert relative_error(output.token_loss, losses, FLOOR) < TOLERANCE
    for gradient, true in zip(gradients, truth, strict=True):
        assert relative_error(gradient, true, FLOOR) < TOLERANCE
    statistics = {
        "nll": target.nll,
        "trust": target.trust,
        "label_mass": target.label_mass,
        "kl": target.kl.nan_to_num(),
        "entropy": target.tile.policy.entropy,
        "is_top1": target.tile.is_top1,
        "prior_is_top1": prior[scored].is_top1(target.tile.labels, target.tile.is_top1),
    }
    for name, value in statistics.items():
        assert relative_error(getattr(output, name)[scored].nan_to_num(), value, 1.0) < TOLERANCE, name


@pytest.mark.parametrize("tail", ["policy", "uniform"])
@pytest.mark.parametrize("name", TARGETS)
def test_fused_equals_dense(name, tail):
    for shape, head, chunk_tokens in zip(SHAPES, HEADS, (None, 1, 5), strict=True):
        problem = make_problem(*shape, head=head)
        config = QTargetConfig(**TARGETS[name], chunk_tokens=chunk_tokens, kernel="torch")
        for k in {1, 2, shape[1] // 2, shape[1] - 1, shape[1]}:
            check_equals_dense(problem, config, top_k_of(problem.prior_logits(), problem.labels, k, tail))


def with_silence(prior: TopKPrior) -> TopKPrior:
    """The same with every third row silent, and numbers there that mean nothing."""
    silent = torch.arange(len(prior.ids)) % 3 == 1
    uniform = torch.full_like(prior.log_probs, -math.log(prior.ids.size(1) + 1))
    return replace(
        prior,
        silent=silent,
        log_probs=torch.where(silent[:, None], uniform, prior.log_probs),
        label_log_probs=torch.where(silent, -3.0, prior.label_log_probs),
        rest_log_mass=torch.where(silent, -1.0, prior.rest_log_mass),
    )


@pytest.mark.parametrize("kernel", ["torch", TRITON])
@pytest.mark.parametrize("tail", ["policy", "uniform"])
@pytest.mark.parametrize("name", TARGETS)
def test_where_it_is_silent_the_policy_is_the_prior(name, tail, kernel):
    problem = make_problem(*SHAPES[1], head=next(iter(HEADS)))
    config = QTargetConfig(**TARGETS[name], chunk_tokens=5, kernel=kernel)
    logits, vocabulary = problem.logits().detach(), SHAPES[1][1]
    for k in (2, vocabulary) if kernel == "torch" else (4,):
        check_equals_dense(problem, config, with_silence(top_k_of(problem.prior_logits(), problem.labels, k, tail)))
    prior = with_silence(top_k_of(problem.prior_logits(), problem.labels, vocabulary, tail))
    arguments = problem.dense_arguments(prior=False)
    given = torch.where(prior.silent[:, None], logits, problem.prior_logits())
    live = build_target(logits, problem.labels, config, **arguments, prior_logits=given)
    found = build_target(logits, problem.labels, config, **arguments, prior_top_k=prior)
    assert relative_error(found.probs, live.probs, FLOOR) < TOLERANCE
    assert relative_error(found.scale, live.scale, FLOOR) < TOLERANCE


@pytest.mark.parametrize("name", ["target_sft", "asft", "iw_sft", "formula"])
def test_all_tokens_known_is_the_live_prior(name):
    problem, config = make_problem(*SHAPES[1]), QTargetConfig(**TARGETS[name])
    for tail in ("policy", "uniform"):
        prior = top_k_of(problem.prior_logits(), problem.labels, SHAPES[1][1], tail)
        leaves = problem.leaves()
        live = linear_qtarget_loss(
            *leaves[:2], problem.labels, config, bias=leaves[2], **problem.linear_arguments(prior=True)
        )
        output, gradients = fused(problem, config, prior)
        assert relative_error(output.token_loss, live.token_loss, FLOOR) < TOLERANCE
        for gradient, true in zip(gradients, torch.autograd.grad(live.loss, leaves), strict=True):
            assert relative_error(gradient, true, FLOOR) < TOLERANCE


@pytest.mark.parametrize(("name", "eta"), [("distill", 1.0), ("target_sft", 0.3)])
def test_gradient_is_that_of_the_divergence_over_k_plus_one_events(name, eta):
    problem, k = make_problem(*SHAPES[1]), 4
    logits = problem.logits().detach()[problem.scored].requires_grad_()
    labels = problem.labels[problem.scored]
    prior = top_k_of(problem.prior_logits()[problem.scored], labels, k)

    def events(log_probs):
        rest = log_probs.scatter(1, prior.ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(1, prior.ids), rest], dim=1)

    policy = events(logits.log_softmax(-1))
    known = torch.cat([prior.log_probs, prior.rest_log_mass[:, None]], dim=1)
    q = ((1 - eta) * policy.detach() + eta * known).log_softmax(-1)
    trust = torch.zeros(len(labels)) if name == "distill" else policy.new_tensor(0) + _label(logits).exp()
    divergence = (q.exp() * (q - policy)).sum(-1)
    nll = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    loss = trust * nll + (1 - trust) * divergence
    (truth,) = torch.autograd.grad(loss.sum(), logits)

    config = {"method": name} if name == "distill" else {"method": name, "eta": eta}
    target = build_target(logits, labels, config, prior_top_k=prior)
    assert relative_error(target.scale[:, None] * (logits.softmax(-1) - target.probs), truth) < 1e-14


def _label(logits):
    problem = make_problem(*SHAPES[1])
    return logits.detach().log_softmax(-1).gather(1, problem.labels[problem.scored][:, None])[:, 0]


@pytest.mark.parametrize("kernel", ["torch", TRITON])
def test_rests_too_small_for_a_difference_of_ones(kernel):
    # The policy leaves 1e-60 to all others and the prior 1e-12: float32 knows neither 1 - Σ nor exp(-138).
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width, k = 6, 40, 8, 3
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    bias = torch.zeros(vocabulary, dtype=torch.float64)
    bias[:k] = 140.0
    labels = torch.tensor([0, 1, 2, 5, 7, 39])
    ids = torch.arange(k).expand(tokens, k)
    log_probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().expand(tokens, k)
    numbers = torch.full((tokens,), math.log(1e-12), dtype=torch.float64)
    for name in ("distill", "target_sft"):
        found = []
        for dtype in (torch.float64, torch.float32):
            prior = TopKPrior(ids, log_probs.to(dtype), numbers.to(dtype), numbers.to(dtype))
            leaves = [value.to(dtype).requires_grad_() for value in (hidden, weight, bias)]
            config = QTargetConfig(name, kernel=kernel)
            output = linear_qtarget_loss(*leaves[:2], labels, config, bias=leaves[2], prior_top_k=prior)
            found.append((output, torch.autograd.grad(output.loss, leaves)))
        (truth, gradients), (output, rounded) = found
        assert output.loss.isfinite() and relative_error(output.token_loss, truth.token_loss) < 1e-5
        # Of the tail alone, which no other gradient hides.
        assert relative_error(rounded[2][k:], gradients[2][k:]) < 1e-4
        if name == "distill":
            assert gradients[2][k:].sum().item() == pytest.approx(-1e-12, rel=1e-6)


def test_policy_without_a_tail_conditions_the_prior():
    # All others are masked: nothing can take the prior's rest, and what is known shares it.
    logits = torch.full((2, 5), -math.inf, dtype=torch.float64)
    logits[:, :2] = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    prior = TopKPrior(
        torch.tensor([[0, 1]] * 2), torch.full((2, 2), 0.25).double().log(), *[torch.zeros(2).double()] * 2
    )
    prior = replace(prior, rest_log_mass=torch.full((2,), 0.5).double().log())
    target = build_target(logits, torch.tensor([0, 1]), "distill", prior_top_k=prior)
    torch.testing.assert_close(target.probs, torch.tensor([[0.5, 0.5, 0, 0, 0]] * 2).double())
    # The same through the fused loss, with a head that masks by its bias.
    hidden, weight = torch.eye(2).double().requires_grad_(), logits.nan_to_num(neginf=0).T.contiguous()
    bias = torch.tensor([0.0, 0, -math.inf, -math.inf, -math.inf]).double()
    config = QTargetConfig("distill", kernel="torch")
    output = linear_qtarget_loss(hidden, weight, torch.tensor([0, 1]), config, bias=bias, prior_top_k=prior)
    expected = (logits.softmax(-1) - target.probs) / 2 @ weight
    torch.testing.assert_close(torch.autograd.grad(output.loss, hidden)[0], expected)


def test_triton_equals_plain():
    pytest.importorskip("triton")
    if not choice._interpreted():
        pytest.skip("on a GPU the kernels are compiled")
    for name, tail, shape, head in (
        ("target_sft", "policy", SHAPES[2], "capped"),
        ("formula", "policy", SHAPES[1], "plain"),
        ("asft", "uniform", SHAPES[1], "scaled"),
        ("psft", "policy", SHAPES[1], "plain"),
    ):
        problem = make_problem(*shape, head=head)
        config = QTargetConfig(**TARGETS[name], chunk_tokens=6, kernel="triton")
        for k in (3, shape[1]):
            check_equals_dense(problem, config, top_k_of(problem.prior_logits(), problem.labels, k, tail))


def test_residuals_of_your_own():
    @register_residual("steered", uses_prior=True)
    def steered(tile):
        return tile.mixture(policy=0.25, prior=0.75)

    @register_residual("steered_and_sharp", uses_prior=True)  # written out: no k + 1 numbers describe the second one
    def steered_and_sharp(tile):
        return tile.mixture(policy=0.5, prior=0.5), tile.mixture(policy=2.0)

    try:
        problem = make_problem(*SHAPES[1])
        for residual in ("steered", "steered_and_sharp"):
            config = QTargetConfig(method=None, trust="probability", residual=residual, kernel="torch")
            check_equals_dense(problem, config, top_k_of(problem.prior_logits(), problem.labels, 5))
    finally:
        for residual in ("steered", "steered_and_sharp"):
            RESIDUALS.pop(residual, None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "distill", "temperature": 2.0}, "the residual 'prior', temperature=2.0"),
        ({"method": "mask_target"}, "the residual 'spared_prior'"),
        ({"method": "lp_sft"}, "the residual 'spared_top'"),
        ({"method": "prift_mass"}, "the trust 'prior_mass'"),
        ({"method": None, "trust": "1 / (1 + H_prior)", "residual": "policy"}, "the trust '1 / "),
        ({"method": None, "trust": "one", "residual": "guided", "scale": "H_prior"}, "the scale 'H_prior'"),
    ],
)
def test_what_reads_more_of_the_prior_is_refused(fields, named):
    problem = make_problem(*SHAPES[1])
    for tail in ("policy", "uniform"):
        prior = top_k_of(problem.prior_logits(), problem.labels, 5, tail)
        with pytest.raises(ValueError, match="is not enough for") as dense:
            qtarget_loss(problem.logits(), problem.labels, fields, prior_top_k=prior)
        with pytest.raises(ValueError, match="is not enough for"):
            fused(problem, QTargetConfig(**fields), prior)
    assert named in str(dense.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "none"}, "`prior_top_k.tail='none'` is unknown"),
        ({"ids": torch.zeros(13, 3, dtype=torch.long)}, "names a token twice"),
        ({"ids": torch.arange(3).expand(12, 3)}, r"`prior_top_k.ids` must be \[13, K\]"),
        ({"ids": torch.arange(35, 38).expand(13, 3)}, "outside the vocabulary of 37"),
        ({"ids": torch.rand(13, 3)}, "must be token ids"),
        ({"rest_log_mass": torch.zeros(13, 1)}, r"`prior_top_k.rest_log_mass` must have shape \[13\]"),
        ({"log_probs": torch.ones(13, 3)}, "`prior_top_k.log_probs` must hold log-probabilities"),
    ],
)
def test_tensors_that_are_no_such_prior_are_refused(change, message):
    problem = make_problem(*SHAPES[1])
    prior = replace(top_k_of(problem.prior_logits(), problem.labels, 3), **change)
    with pytest.raises(ValueError, match=message):
        qtarget_loss(problem.logits(), problem.labels, "target_sft", prior_top_k=prior)
    with pytest.raises(ValueError, match=message):
        fused(problem, QTargetConfig("target_sft"), prior)


def test_two_priors_are_refused():
    problem = make_problem(*SHAPES[1])
    prior = top_k_of(problem.prior_logits(), problem.labels, 3)
    with pytest.raises(ValueError, match="`prior_top_k` and `prior_logits` are two priors"):
        qtarget_loss(problem.logits(), problem.labels, "target_sft", **problem.dense_arguments(), prior_top_k=prior)
    with pytest.raises(ValueError, match="`prior_top_k` and `prior_hidden` are two priors"):
        linear_qtarget_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            "target_sft",
            **problem.linear_arguments(),
            prior_top_k=prior,
        )
