"""Rounding, extreme inputs and the work that is left out: the fused loss is never worse than the plain dense one."""

import pytest
import torch
from formulas import FORMULAS, IGNORE, make_problem
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss, qtarget_loss
from trl_qtarget import gemm as gemm_module


HALF = [torch.bfloat16, torch.float16]
PER_TOKEN = ("token_weights", "sequence_ids")
NAMES = ("hidden", "weight", "bias")


def arguments_of(problem, dtype: torch.dtype, spread: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a problem in `dtype`, hidden states times `spread`; the truth starts from the rounded ones."""
    values = {name: getattr(problem, name) for name in (*NAMES, "prior_hidden", "prior_weight", "prior_bias")}
    values["hidden"], values["prior_hidden"] = values["hidden"] * spread, values["prior_hidden"] * spread
    return {name: value.to(dtype) for name, value in values.items()}


def dense(problem, config, values: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
    """The plain way: logits in the dtype of the operands, then the dense loss."""
    hidden, weight, bias = leaves
    prior_logits = values["prior_hidden"] @ values["prior_weight"].t() + values["prior_bias"]
    kwargs = {name: getattr(problem, name) for name in PER_TOKEN}
    logits = hidden @ weight.t() + bias
    return qtarget_loss(logits, problem.labels, config, prior_logits=prior_logits, **kwargs)


def fused(problem, config, values: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
    hidden, weight, bias = leaves
    priors = {name: values[name] for name in ("prior_hidden", "prior_weight", "prior_bias")}
    kwargs = {name: getattr(problem, name) for name in PER_TOKEN}
    return linear_qtarget_loss(hidden, weight, problem.labels, config, bias=bias, **priors, **kwargs).loss


def results(loss, problem, config, values: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Loss and gradients of one way, unscaled, in float64."""
    leaves = [values[name].detach().clone().requires_grad_() for name in NAMES]
    value = loss(problem, config, values, leaves)
    assert value.dtype == torch.float64 if leaves[0].dtype == torch.float64 else value.dtype == torch.float32
    (value * scale).backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return {
        "loss": value.detach().double(),
        **{name: leaf.grad.double() / scale for name, leaf in zip(NAMES, leaves, strict=True)},
    }


def assert_no_worse(fast: dict, plain: dict, truth: dict, dtypes: dict[str, torch.dtype], slack: float = 0.0) -> None:
    """|fast - truth| <= |plain - truth| + tolerance, norm-wise for each tensor.

    The tolerance is what no implementation avoids: the result itself is rounded to its dtype, by half an `eps` of the
    norm (one more eps in float16, whose small numbers have fewer bits), and is a sum in float32, to 4 of its `eps`.
    """
    for name, true in truth.items():
        dtype = dtypes.get(name, torch.float32)
        rounding = torch.finfo(dtype).eps * {torch.bfloat16: 0.5, torch.float16: 1.5}.get(dtype, 0.0)
        tolerance = (rounding + 4 * torch.finfo(torch.float32).eps + slack) * true.norm()
        error, plain_error = (fast[name] - true).norm(), (plain[name] - true).norm()
        assert torch.isfinite(fast[name]).all(), name
        assert error <= plain_error + tolerance, f"{name}: {error:.3e} > {plain_error:.3e} + {tolerance:.3e}"


# --- against the truth ---


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_no_worse_than_the_dense_loss(name, dtype):
    for shape in [(13, 37, 6, 1), (61, 203, 31, 2)]:
        problem = make_problem(*shape)
        config = QTargetConfig(name, chunk_tokens=7)
        values = arguments_of(problem, dtype, 0.5)
        exact = {name: value.double() for name, value in values.items()}
        truth = results(dense, problem, config, exact)
        fast, plain = (results(way, problem, config, values) for way in (fused, dense))
        assert_no_worse(fast, plain, truth, dict.fromkeys(NAMES, dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_logits_are_not_rounded_before_the_softmax(dtype):
    # The errors are not only no larger: without the rounding of the logits they are several times smaller.
    problem = make_problem(61, 203, 31, 3)
    values = arguments_of(problem, dtype)
    truth = results(dense, problem, "sft", {name: value.double() for name, value in values.items()})
    fast, plain = (results(way, problem, "sft", values) for way in (fused, dense))
    for key in ("loss", *NAMES):
        assert (fast[key] - truth[key]).norm() < 0.5 * (plain[key] - truth[key]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_extreme_logits(name, dtype):
    problem = make_problem(29, 53, 7, 4)
    values = arguments_of(problem, dtype, 1.0)
    spread = (values["hidden"].double() @ values["weight"].double().t()).abs().max().item()
    values["hidden"], values["prior_hidden"] = (values[key] * (1e4 / spread) for key in ("hidden", "prior_hidden"))
    exact = {name: value.double() for name, value in values.items()}
    truth = results(dense, problem, name, exact)
    fast, plain = (results(way, problem, name, values) for way in (fused, dense))
    # A float32 logit of 1e4 has an error of up to 1e4 eps, and so have the log-probabilities.
    assert_no_worse(fast, plain, truth, dict.fromkeys(NAMES, dtype), slack=1e4 * torch.finfo(torch.float32).eps)


def test_a_head_of_more_than_one_slice():
    # Half-precision heads are raised to float32 by slices of 16 Mi elements, on any device without mixed products.
    problem = make_problem(3, 300_007, 60, 5)
    values = arguments_of(problem, torch.bfloat16, 0.3)
    truth = results(dense, problem, "sft", {name: value.float() for name, value in values.items()})
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
    truth = results(dense, problem, name, {key: value.double() for key, value in exact.items()})
    values["hidden"], values["prior_hidden"] = (values[key].to(hidden_dtype) for key in ("hidden", "prior_hidden"))

    def under_autocast(way):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return way(*args)

        return run

    fast, plain = (results(under_autocast(way), problem, name, values) for way in (fused, dense))
    dtypes = {"hidden": hidden_dtype, "weight": torch.float32, "bias": torch.float32}
    assert_no_worse(fast, plain, truth, dtypes)


def test_float32_weight_gradient_under_autocast_is_a_float32_sum():
    problem = make_problem(61, 203, 31, 7)
    values = arguments_of(problem, torch.float32, 0.5)
    exact = {key: value if "bias" in key else value.bfloat16() for key, value in values.items()}
    truth = results(dense, problem, "sft", {key: value.double() for key, value in exact.items()})
    with torch.autocast("cpu", torch.bfloat16):
        fast = results(fused, problem, "sft", values)
    for key in ("hidden", "weight", "bias"):
        # Products of bfloat16 numbers are exact in float32; what remains are its sums and the float32 softmax.
        assert (fast[key] - truth[key]).norm() < 8 * torch.finfo(torch.float32).eps * truth[key].norm(), key


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
    assert (hidden.grad - truth).norm() < 40 * torch.finfo(torch.float32).eps * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_statistics_are_float32(dtype):
    problem = make_problem(13, 37, 6, 9)
    values = arguments_of(problem, dtype)
    output = linear_qtarget_loss(values["hidden"], values["weight"], problem.labels, "dft", bias=values["bias"])
    for name in ("loss", "token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1"):
        assert getattr(output, name).dtype == torch.float32
    assert output.scored.dtype == torch.bool


# --- nothing to score ---


@pytest.mark.parametrize("items", [None, 0, 17, torch.tensor(0), torch.tensor(17), torch.tensor(17.0)], ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", FORMULAS)
def test_no_scored_token_gives_a_differentiable_zero(name, tokens, items):
    problem = make_problem(max(tokens, 1), 11, 4, 10)
    for key in ("hidden", "prior_hidden", "token_weights", "sequence_ids"):
        setattr(problem, key, getattr(problem, key)[:tokens])
    problem.labels = torch.full((tokens,), IGNORE)
    leaves = problem.leaves()
    output = linear_qtarget_loss(
        *leaves[:2], problem.labels, name, bias=leaves[2], num_items_in_batch=items, **problem.linear_arguments()
    )
    logits = problem.logits().detach().requires_grad_()
    loss = qtarget_loss(logits, problem.labels, name, **problem.dense_arguments())
    for value, inputs in ((output.loss, leaves), (loss, [logits])):
        assert value.item() == 0 and value.grad_fn is not None
        value.backward()
        assert all((leaf.grad == 0).all() for leaf in inputs)
    assert not output.scored.any() and all(getattr(output, key).shape == (tokens,) for key in ("nll", "kl", "trust"))


# --- work that is left out ---


@pytest.fixture
def rows_multiplied(monkeypatch):
    """Counts the tokens that go through each of the three products."""
    counts = {"project": 0, "backproject": 0, "accumulate_weight": 0}

    def counting(name, product, rows):
        def counted(*args):
            counts[name] += rows(*args)
            product(*args)

        return counted

    for name, operand in (("project", 0), ("backproject", 0), ("accumulate_weight", 1)):
        product = getattr(gemm_module, name)
        monkeypatch.setattr(gemm_module, name, counting(name, product, lambda *args, i=operand: args[i].size(0)))
    return counts


# Passes over the scored tokens: logits of the policy, of the prior, and once more for a trust of whole sequences.
PASSES = {"sft": 1, "dft": 1, "gem": 1, "target_sft": 2, "asft": 2, "psft": 2, "iw_sft": 4}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("mode", ["train", "frozen head", "frozen body", "eval", "nothing asks"])
def test_products(name, mode, rows_multiplied):
    problem = make_problem(29, 37, 6, 11)
    scored = int(problem.scored.sum())
    hidden, weight, bias = problem.leaves()
    hidden.requires_grad_(mode not in ("frozen body", "nothing asks"))
    for leaf in (weight, bias):
        leaf.requires_grad_(mode not in ("frozen head", "nothing asks"))
    with torch.set_grad_enabled(mode != "eval"):
        config = QTargetConfig(name, chunk_tokens=4)
        arguments = {**problem.linear_arguments(), "bias": bias}
        loss = linear_qtarget_loss(hidden, weight, problem.labels, config, **arguments).loss
    has_gradient = mode not in ("eval", "nothing asks")
    assert (loss.grad_fn is not None) == has_gradient
    if has_gradient:
        # A gradient that nobody asks for is not even allocated: that of the head is as large as the head.
        kept = [gradient is not None for gradient in loss.grad_fn.gradients]
        assert kept == [leaf.requires_grad for leaf in (hidden, weight, bias)]
        loss.backward()
    assert (hidden.grad is not None) == (mode in ("train", "frozen head"))
    assert (weight.grad is not None) == (bias.grad is not None) == (mode in ("train", "frozen body"))
    assert rows_multiplied == {
        "project": PASSES[name] * scored,  # ignored tokens are not even projected
        "backproject": scored * (hidden.grad is not None),
        "accumulate_weight": scored * (weight.grad is not None),
    }


@pytest.mark.parametrize("knobs", [{"eta": 0.0}, {"prior": "policy"}], ids=str)
def test_a_prior_that_is_not_used_is_not_projected(knobs, rows_multiplied):
    problem = make_problem(29, 37, 6, 12)
    config = QTargetConfig("target_sft", **knobs)
    linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config, **problem.linear_arguments())
    assert rows_multiplied["project"] == problem.scored.sum()


def test_values_are_the_same_in_evaluation():
    problem = make_problem(29, 37, 6, 13)
    hidden, weight, bias = problem.leaves()
    arguments = {**problem.linear_arguments(), "bias": bias}
    train = linear_qtarget_loss(hidden, weight, problem.labels, "asft", **arguments)
    with torch.no_grad():
        evaluation = linear_qtarget_loss(hidden, weight, problem.labels, "asft", **arguments)
    for name in ("loss", "token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1", "scored"):
        assert torch.equal(getattr(train, name), getattr(evaluation, name))


def test_inputs_are_left_as_they_were():
    for name in FORMULAS:
        problem, twin = make_problem(13, 37, 6, 14), make_problem(13, 37, 6, 14)
        evaluate = problem.leaves()
        loss = linear_qtarget_loss(*evaluate[:2], problem.labels, name, **problem.linear_arguments()).loss
        qtarget_loss(problem.logits(), problem.labels, name, **problem.dense_arguments())
        loss.backward()
        for key, value in vars(twin).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(problem, key), value), (name, key)
        assert torch.equal(evaluate[0], twin.hidden) and torch.equal(evaluate[1], twin.weight)


# --- backward ---


def test_a_second_backward_pass_is_refused():
    problem = make_problem(13, 37, 6, 15)
    hidden, weight, _ = problem.leaves()
    loss = linear_qtarget_loss(hidden, weight, problem.labels, "sft").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a first backward pass has already taken: compute the loss again"):
        loss.backward()


def test_gradients_add_up_over_calls():
    problem = make_problem(13, 37, 6, 16)
    hidden, weight, _ = problem.leaves()
    for _ in range(2):
        linear_qtarget_loss(hidden, weight, problem.labels, "sft").loss.backward()
    once = problem.leaves()
    linear_qtarget_loss(*once[:2], problem.labels, "sft").loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0].grad) and torch.equal(weight.grad, 2 * once[1].grad)
