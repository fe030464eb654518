"""Errors of low precision: of the package, and of a published formula in the same dtype, both against float64."""

from collections.abc import Callable

import torch
from designs import free_formula
from formulas import FORMULAS
from problems import Problem
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss, qtarget_loss


HALF = [torch.bfloat16, torch.float16]
NAMES = ("hidden", "weight", "bias")
PRIOR_NAMES = tuple(f"prior_{name}" for name in NAMES)
Way = Callable[[Problem, QTargetConfig, dict[str, Tensor], list[Tensor]], Tensor]


def arguments_of(problem: Problem, dtype: torch.dtype, spread: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a problem in `dtype`, hidden states times `spread`; the truth starts from the rounded ones."""
    values = {name: getattr(problem, name) for name in (*NAMES, *PRIOR_NAMES)}
    values["hidden"], values["prior_hidden"] = values["hidden"] * spread, values["prior_hidden"] * spread
    problem.token_weights = problem.token_weights.float()
    return {name: value.to(dtype) for name, value in values.items()}


def logits_of(values: dict[str, Tensor], leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the policy and of the prior, in the dtype of the operands."""
    hidden, weight, bias = leaves
    prior_logits = values["prior_hidden"] @ values["prior_weight"].t() + values["prior_bias"]
    return hidden @ weight.t() + bias, prior_logits


def published(problem: Problem, config: QTargetConfig, values: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
    """The plain way: logits in the dtype of the operands, then the published formula, in float32 at least."""
    logits, prior_logits = logits_of(values, leaves)
    rows, free = problem.scored, config.method is None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    formula = free_formula(config.trust, config.residual) if free else FORMULAS[config.method]
    losses = formula(
        logits[rows].to(dtype),
        problem.labels[rows],
        prior_logits[rows].to(dtype),
        problem.token_weights[rows].to(dtype),
        problem.sequence_ids[rows],
        **({"embeddings": leaves[1].detach().to(dtype), **config.knobs} if free else {}),  # one number for both
    )
    return losses.mean()


def dense(problem: Problem, config: QTargetConfig, values: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
    logits, prior_logits = logits_of(values, leaves)
    kwargs = {name: getattr(problem, name) for name in ("token_weights", "sequence_ids")}
    kwargs["embeddings"] = leaves[1].detach()
    return qtarget_loss(logits, problem.labels, config, prior_logits=prior_logits, **kwargs)


def fused(problem: Problem, config: QTargetConfig, values: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
    hidden, weight, bias = leaves
    kwargs = {name: getattr(problem, name) for name in ("token_weights", "sequence_ids")}
    kwargs.update({name: values[name] for name in PRIOR_NAMES})
    return linear_qtarget_loss(hidden, weight, problem.labels, config, bias=bias, **kwargs).loss


def results(way: Way, problem: Problem, config: QTargetConfig | str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of one way, in float64."""
    leaves = [values[name].detach().clone().requires_grad_() for name in NAMES]
    value = way(problem, QTargetConfig.coerce(config), values, leaves)
    assert value.dtype == torch.promote_types(leaves[0].dtype, torch.float32)
    value.backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return {
        "loss": value.detach().double(),
        **{name: leaf.grad.double() for name, leaf in zip(NAMES, leaves, strict=True)},
    }


def truth_of(problem: Problem, config: QTargetConfig | str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of the published formula in float64, from the same rounded tensors."""
    return results(published, problem, config, {name: value.double() for name, value in values.items()})


def assert_no_worse(fast: dict, plain: dict, truth: dict, dtypes: dict[str, torch.dtype], slack: float = 0.0) -> None:
    """|fast - truth| <= |plain - truth| + tolerance, norm-wise for each tensor.

    The tolerance is what no implementation avoids: the result itself is rounded to its dtype, by half an `eps` of the
    norm (one more eps in float16, whose small numbers have fewer bits), and is a sum in float32, to 4 of its `eps`.
    Where the plain formula overflows, the tolerance is all that is granted.
    """
    for name, true in truth.items():
        dtype = dtypes.get(name, torch.float32)
        rounding = torch.finfo(dtype).eps * {torch.bfloat16: 0.5, torch.float16: 1.5}.get(dtype, 0.0)
        tolerance = (rounding + 4 * torch.finfo(torch.float32).eps + slack) * true.norm()
        error, plain_error = (fast[name] - true).norm(), (plain[name] - true).norm().nan_to_num(0.0, 0.0)
        assert torch.isfinite(fast[name]).all(), name
        tolerance += 1e-30  # products of probabilities, at the end of what float32 can tell from zero
        assert error <= plain_error + tolerance, f"{name}: {error:.3e} > {plain_error:.3e} + {tolerance:.3e}"
