"""A row of logits that leaves no token possible is no distribution: NaN, from the dense loss and from every kernel."""

import math

import pytest
import torch
from measured import CLOSED
from problems import make_problem
from thinned import by_ways, thinned

from trl_qtarget import QTargetConfig, build_target, linear_qtarget_loss, qtarget_loss
from trl_qtarget.loss.chunks import STATISTICS


pytest.importorskip("triton")

ROWS = torch.tensor([4, 5])
DTYPES = [torch.float64, torch.float32]


def ways(config: QTargetConfig, values: dict[str, torch.Tensor]):
    """Losses per token of the dense function, and the outputs of both kernels, with their hidden gradients."""
    logits = values["hidden"] @ values["weight"].t() + values["bias"]
    prior_logits = values["prior_hidden"] @ values["prior_weight"].t() + values["prior_bias"]
    rest = {name: values[name] for name in ("token_weights", "sequence_ids")}
    labels = values["labels"]
    dense = qtarget_loss(logits, labels, config, reduction="none", prior_logits=prior_logits, **rest)
    outputs = []
    for kernel in ("torch", "triton"):
        hidden = values["hidden"].clone().requires_grad_()
        given = QTargetConfig(**{**config.to_dict(), "kernel": kernel})
        names = ("bias", "prior_hidden", "prior_weight", "prior_bias")
        arguments = {**rest, **{name: values[name] for name in names}}
        output = linear_qtarget_loss(hidden, values["weight"], labels, given, **arguments)
        (gradient,) = torch.autograd.grad(output.loss, hidden)
        outputs.append((output, gradient))
    return dense, outputs


def values_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    problem = make_problem(9, 23, 4, 6)
    values = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    values["labels"] = problem.labels.clamp(min=0)
    values["sequence_ids"] = torch.arange(9)
    # Positive, so that hidden states of -inf make logits of -inf.
    values["weight"], values["prior_weight"] = values["weight"].abs(), values["prior_weight"].abs()
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


@pytest.mark.parametrize("which", ["hidden", "prior_hidden"])
@pytest.mark.parametrize("method", thinned(CLOSED, by_ways))
def test_a_row_of_nothing_but_minus_infinity(method, which):
    config, values = QTargetConfig(method), values_of(torch.float32)
    values["labels"][ROWS] = torch.tensor([0, 7])  # 0 is what `argmax` says of a row of NaN
    rows = values[which].clone()
    rows[ROWS] = -math.inf
    dense, outputs = ways(config, {**values, which: rows})
    nowhere = which == "prior_hidden" and not config.objective(has_prior=True).uses_prior
    expected = torch.zeros(9, dtype=torch.bool) if nowhere else torch.isin(torch.arange(9), ROWS)
    assert torch.equal(dense.isnan(), expected)
    for output, gradient in outputs:
        torch.testing.assert_close(output.token_loss, dense, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(gradient.isnan().any(-1), expected)
        assert (output.is_top1[ROWS] == 0).all() or which == "prior_hidden"
        assert (output.prior_is_top1[ROWS] != 1).all() or which == "hidden"
    (plain, _), (fast, _) = outputs
    for name in STATISTICS:
        one, other = (getattr(output, name)[~expected] for output in (plain, fast))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eta", [0.3, 1 - 1e-9])
def test_a_policy_and_a_prior_that_share_no_token(eta, dtype):
    values = values_of(dtype)
    values["bias"], values["prior_bias"] = values["bias"].clone(), values["prior_bias"].clone()
    values["bias"][:11], values["prior_bias"][11:] = -math.inf, -math.inf
    values["labels"][:] = 12
    dense, outputs = ways(QTargetConfig("target_sft", eta=eta), values)
    assert dense.isnan().all()
    for output, gradient in outputs:
        assert output.token_loss.isnan().all() and gradient.isnan().all()
    # Nothing is lost where they share one: it gets all.
    values["prior_bias"][12] = 0.0
    dense, outputs = ways(QTargetConfig("target_sft", eta=eta), values)
    for losses in (dense, *(output.token_loss for output, _ in outputs)):
        torch.testing.assert_close(losses, outputs[0][0].nll, rtol=1e-5, atol=1e-5)


def test_a_top_k_of_a_row_without_a_token():
    logits = torch.full((2, 5), -math.inf)
    logits[0] = torch.arange(5.0)
    target = build_target(logits, torch.tensor([1, 1]), "eaft")
    assert target.probs[0].isfinite().all() and target.probs[1].isnan().all()
