"""Rounding and extreme inputs: neither loss is worse than the published formula in the same dtype."""

import pytest
import torch
from designs import SOME_PAIRS, free_formula
from formulas import FORMULAS
from problems import make_problem
from rounding import HALF, NAMES, arguments_of, assert_no_worse, fused, logits_of, published, results, truth_of
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss, qtarget_loss


# --- against the truth ---


SHAPES = [(13, 37, 6, 1), (61, 203, 31, 2)]
FREE = SOME_PAIRS
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_method_is_no_worse_than_its_formula(name, dtype):
    for shape in SHAPES:
        problem = make_problem(*shape)
        config = QTargetConfig(name, chunk_tokens=7)
        values = arguments_of(problem, dtype, 0.5)
        fast, plain = (results(way, problem, config, values) for way in (fused, published))
        assert_no_worse(fast, plain, truth_of(problem, config, values), dict.fromkeys(NAMES, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("trust", "residual"), FREE)
def test_free_combination_is_no_worse_than_its_formula(trust, residual, dtype):
    for shape in SHAPES:
        problem = make_problem(*shape)
        config = QTargetConfig(None, trust=trust, residual=residual, chunk_tokens=7)
        values = arguments_of(problem, dtype, 0.5)
        fast, plain = (results(way, problem, config, values) for way in (fused, published))
        slack = importance_slack(problem, values) if trust == "importance" else 0.0
        assert_no_worse(fast, plain, truth_of(problem, config, values), dict.fromkeys(NAMES, dtype), slack)


def importance_slack(problem, values: dict[str, Tensor]) -> float:
    """Relative error of γ = exp(mean log-ratio) that float32 does not avoid.

    A log-probability is a difference of two numbers as large as the row's logits, each rounded by half an `eps` of its
    size. The formula rounds them in another order, and with γ near 1 the loss γ NLL + (1 - γ) CE(π̃) depends on which.
    """
    logits, prior_logits = (x.double() for x in logits_of(values, [values[name] for name in NAMES]))
    return EPS * (logits.abs().amax(-1) + prior_logits.abs().amax(-1)).mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "case", [*FORMULAS, *FREE], ids=lambda case: case if isinstance(case, str) else "-".join(case)
)
def test_dense_loss_is_no_worse_than_the_formula(case, dtype):
    # On logits that are given, so that the rounding of the softmax and of the loss is all there is. The slack is for
    # the backward pass of `log_softmax`, a sum over the vocabulary that the formulas' `logsumexp` orders otherwise.
    is_method = isinstance(case, str)
    config = QTargetConfig(case) if is_method else QTargetConfig(None, trust=case[0], residual=case[1])
    formula = FORMULAS[case] if is_method else free_formula(*case)
    if (case == "lp_sft" or "spared_top" in case) and dtype != torch.float32:
        pytest.skip("rounded logits tie at the end of the prior's top_k, and either of two tokens is right")
    problem = make_problem(9, 2003, 6, 12)
    given = {"logits": 0.5 * problem.logits(), "prior_logits": 0.5 * problem.prior_logits()}
    given = {name: value.to(dtype) for name, value in given.items()}
    problem.token_weights = problem.token_weights.float()

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        logits = given["logits"].to(dtype).requires_grad_()
        rows = problem.scored
        extra = {} if is_method else {"embeddings": problem.weight.to(dtype)}
        prior_logits, weights = given["prior_logits"][rows].to(dtype), problem.token_weights[rows].to(dtype)
        losses = formula(
            logits[rows], problem.labels[rows], prior_logits, weights, problem.sequence_ids[rows], **extra
        )
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        return {"losses": losses.detach().double(), "gradient": gradient.double()}

    logits = given["logits"].requires_grad_()
    arguments = {**problem.dense_arguments(), "prior_logits": given["prior_logits"]}
    arguments["embeddings"] = problem.weight.float()
    losses = qtarget_loss(logits, problem.labels, config, reduction="none", **arguments)
    assert losses.dtype == torch.float32
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    own = {"losses": losses.detach()[problem.scored].double(), "gradient": gradient.double()}
    assert_no_worse(own, plain(torch.float32), plain(torch.float64), {"gradient": dtype}, slack=16 * EPS)


@pytest.mark.parametrize("name", FORMULAS)
def test_small_losses_of_the_dense_loss_keep_their_digits(name):
    # Labels of probability 1e-4: what `dft` reports is 1e4 times smaller than the cross-entropy to its target.
    generator = torch.Generator().manual_seed(13)
    logits, prior_logits = torch.randn(2, 31, 5000, generator=generator)
    labels = torch.randint(5000, (31,), generator=generator)
    weights = torch.rand(31, generator=generator)
    losses, plain, truth = (
        loss(logits.to(dtype), labels, prior_logits=prior_logits.to(dtype), token_weights=weights.to(dtype))
        for loss, dtype in (
            (lambda *args, **kwargs: qtarget_loss(*args, name, reduction="none", **kwargs), torch.float32),
            (FORMULAS[name], torch.float32),
            (FORMULAS[name], torch.float64),
        )
    )
    slack = 4 * EPS
    if name == "trim_sft":
        # d log γ/dΔ = (beta - Δ)/tau² multiplies what Δ is off: each of two logarithms by half an `eps` of its size.
        log_probs = logits.double().log_softmax(-1)
        label, largest = log_probs.gather(1, labels[:, None]).squeeze(1), log_probs.amax(-1)
        slack += EPS / 2 * ((1.5 - label + largest) / 0.8**2 * -(label + largest)).max().item()
    assert_no_worse(*({"losses": values.double()} for values in (losses, plain, truth)), {}, slack=slack)


@pytest.mark.parametrize("name", FORMULAS)
def test_small_gradients_of_the_dense_loss_keep_their_digits(name):
    # p - Q = γ (p - δ) with γ about 1e-4, as `dft` has it here, is a small difference of p and Q.
    generator = torch.Generator().manual_seed(13)
    logits, prior_logits = torch.randn(2, 31, 5000, generator=generator)
    labels = torch.randint(5000, (31,), generator=generator)
    weights = 1e-4 * torch.rand(31, generator=generator)

    def gradient(loss, dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        losses = loss(leaf, labels, prior_logits=prior_logits.to(dtype), token_weights=weights.to(dtype))
        return {"gradient": torch.autograd.grad(losses.sum(), leaf)[0].double()}

    own = gradient(lambda *args, **kwargs: qtarget_loss(*args, name, reduction="none", **kwargs), torch.float32)
    plain, truth = (gradient(FORMULAS[name], dtype) for dtype in (torch.float32, torch.float64))
    assert_no_worse(own, plain, truth, {}, slack=16 * EPS)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_logits_are_not_rounded_before_the_softmax(dtype):
    # The errors are not only no larger: without the rounding of the logits they are several times smaller.
    problem = make_problem(61, 203, 31, 3)
    values = arguments_of(problem, dtype)
    truth = truth_of(problem, "sft", values)
    fast, plain = (results(way, problem, "sft", values) for way in (fused, published))
    for key in ("loss", *NAMES):
        assert (fast[key] - truth[key]).norm() < 0.5 * (plain[key] - truth[key]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_extreme_logits(name, dtype):
    problem = make_problem(29, 53, 7, 4)
    values = arguments_of(problem, dtype, 1.0)
    spread = (values["hidden"].double() @ values["weight"].double().t()).abs().max().item()
    values["hidden"], values["prior_hidden"] = (values[key] * (1e4 / spread) for key in ("hidden", "prior_hidden"))
    truth = truth_of(problem, name, values)
    fast, plain = (results(way, problem, name, values) for way in (fused, published))
    # A float32 logit of 1e4 has an error of up to 1e4 eps, and so have the log-probabilities.
    assert_no_worse(fast, plain, truth, dict.fromkeys(NAMES, dtype), slack=1e4 * EPS)


def test_a_head_of_more_than_one_slice():
    # Half-precision heads are raised to float32 by slices of 16 Mi elements, on any device without mixed products.
    problem = make_problem(3, 300_007, 60, 5)
    values = arguments_of(problem, torch.bfloat16, 0.3)
    truth = results(published, problem, "sft", {name: value.float() for name, value in values.items()})
    fast = results(fused, problem, "sft", values)
    # Stricter than `no worse`: exact but for the rounding of the results, and of the truth, which is float32 here.
    assert_no_worse(fast, truth, truth, dict.fromkeys(NAMES, torch.bfloat16), slack=1e-6)


@pytest.mark.parametrize("name", ["sft", "target_sft", "asft", "iw_sft", "gem"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(name, hidden_dtype):
    # A float32 master weight: products are in bfloat16, so the truth starts from operands rounded to it.
    problem = make_problem(61, 203, 31, 6)
    values = arguments_of(problem, torch.float32, 0.5)
    exact = {key: value if "bias" in key else value.bfloat16() for key, value in values.items()}
    truth = truth_of(problem, name, exact)
    values["hidden"], values["prior_hidden"] = (values[key].to(hidden_dtype) for key in ("hidden", "prior_hidden"))

    def under_autocast(way):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return way(*args)

        return run

    fast, plain = (results(under_autocast(way), problem, name, values) for way in (fused, published))
    dtypes = {"hidden": hidden_dtype, "weight": torch.float32, "bias": torch.float32}
    assert_no_worse(fast, plain, truth, dtypes)


def test_float32_weight_gradient_under_autocast_is_a_float32_sum():
    problem = make_problem(61, 203, 31, 7)
    values = arguments_of(problem, torch.float32, 0.5)
    exact = {key: value if "bias" in key else value.bfloat16() for key, value in values.items()}
    truth = truth_of(problem, "sft", exact)
    with torch.autocast("cpu", torch.bfloat16):
        fast = results(fused, problem, "sft", values)
    for key in ("hidden", "weight", "bias"):
        # Products of bfloat16 numbers are exact in float32; what remains are its sums and the float32 softmax.
        assert (fast[key] - truth[key]).norm() < 8 * EPS * truth[key].norm(), key


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.float64, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.float64)],
    ids=str,
)
def test_float64_is_left_alone_by_autocast(hidden_dtype, weight_dtype):
    # As by PyTorch's own products: float64 is asked for where its digits are wanted.
    problem = make_problem(13, 37, 6, 17)
    hidden, weight = problem.hidden.to(hidden_dtype), problem.weight.to(weight_dtype)
    expected = linear_qtarget_loss(hidden.double(), weight.double(), problem.labels, "dft").loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_qtarget_loss(hidden, weight, problem.labels, "dft").loss
    assert loss.dtype == torch.float64 and torch.equal(loss, expected)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_float16_gradients_under_a_loss_scale(weight_dtype):
    # A gradient scaler multiplies the loss so that float16 gradients do not underflow: here each token counts 1e-5.
    problem = make_problem(61, 203, 31, 8, bias=False)
    hidden, weight = (problem.hidden * 0.5).half(), problem.weight.to(weight_dtype)
    items, scale = 100_000, 2.0**16

    def gradients(loss, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.float16, enabled=hidden.dtype != weight.dtype):
            value = loss(*leaves)
        (value * scale).backward()
        return [leaf.grad.double() / scale for leaf in leaves]

    def plain(hidden, weight):
        return qtarget_loss(hidden @ weight.t(), problem.labels, "dft", reduction="sum") / items

    def fast(hidden, weight):
        return linear_qtarget_loss(hidden, weight, problem.labels, "dft", num_items_in_batch=items).loss

    truth = gradients(plain, hidden.double(), weight.half().double())
    ways = zip(gradients(fast, hidden, weight), gradients(plain, hidden, weight), truth, strict=True)
    for own, other, true in ways:
        tolerance = torch.finfo(torch.float16).eps * true.norm()
        assert (own - true).norm() <= (other - true).norm() + tolerance


def test_tiny_trust_keeps_its_relative_precision():
    # s γ (p - δ) is computed as such: a label of probability 1e-30 still has a gradient of 1e-30, to float32 digits.
    weight = torch.eye(5)
    hidden = torch.tensor([[70.0, 1.0, 0.5, 0.0, 0.0]], requires_grad=True)
    linear_qtarget_loss(hidden, weight, torch.tensor([1]), "dft").loss.backward()
    p = hidden.detach().double().softmax(-1)
    truth = p[0, 1] * (p - torch.eye(5, dtype=torch.float64)[1])
    assert truth.norm() < 1e-29
    # exp turns the rounding of a log-probability of 69 nats into a relative error of 69 eps/2.
    assert (hidden.grad - truth).norm() < 40 * EPS * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_statistics_are_float32(dtype):
    problem = make_problem(13, 37, 6, 9)
    values = arguments_of(problem, dtype)
    output = linear_qtarget_loss(values["hidden"], values["weight"], problem.labels, "dft", bias=values["bias"])
    for name in ("loss", "token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1"):
        assert getattr(output, name).dtype == torch.float32
    assert output.scored.dtype == torch.bool


@pytest.mark.parametrize("name", ["dft", "target_sft", "mask_target"])
def test_a_nearly_certain_token_in_a_large_vocabulary(name):
    """PyTorch's log-softmax on a CPU is off by percents of such a token's loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = 150_000
    logits, prior = (2 * torch.randn(4, vocabulary, generator=generator) for _ in range(2))
    labels = torch.arange(4)
    for each in (logits, prior):
        each[labels, labels] = 21.0  # p_y is 1 less some thousandths
    config = QTargetConfig(name)
    has_prior = config.objective(has_prior=True).uses_prior

    def found(dtype: torch.dtype, by_head: bool) -> tuple[torch.Tensor, torch.Tensor]:
        z = logits.to(dtype).requires_grad_()
        given = {"prior_logits": prior.to(dtype)} if has_prior else {}
        if by_head:  # by a hidden state per token and the logits as the head: z = I Z
            unit = torch.eye(4, dtype=dtype)
            given = {"prior_hidden": unit, "prior_weight": prior.to(dtype).T} if has_prior else {}
            loss = linear_qtarget_loss(unit, z.T, labels, config, **given).loss
        else:
            loss = qtarget_loss(z, labels, config, **given)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    truth = found(torch.float64, False)
    for by_head in (False, True):
        for value, wanted in zip(found(torch.float32, by_head), truth, strict=True):
            assert (value - wanted).norm() < 5e-4 * wanted.norm(), (name, by_head)
