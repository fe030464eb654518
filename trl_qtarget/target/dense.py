"""The specification: targets and losses on dense logits, in plain PyTorch, through autograd.

Meant to study, test and inspect; `linear.py` computes the same without the `[N, V]` logits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_embeddings,
    check_labels,
    check_per_token,
    check_prior_logits,
    check_progress,
    check_token_weights,
)
from .config import QTargetConfig
from .embeddings import Embeddings
from .objective import Objective
from .split import plan_of
from .tile import LabelStatistics, Tile, finite, log_softmax_, over_tokens
from .token_target import TokenTarget
from .top_k import TopKPrior, check_top_k


class Target(NamedTuple):
    """`probs[N, V]`: the target Q; `scale[N]`: s. The gradient with respect to the logits is `s * (p - Q)`.

    Rows of `probs` sum to one. Entries are negative where a published objective asks for it (`gem`; γ > 1).
    """

    probs: Tensor
    scale: Tensor


def _to_statistics_dtype(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _ValueWithGradient(torch.autograd.Function):
    """The numbers `value[n]`, with the derivatives of `-(s · Q · log_softmax(logits)).sum(-1)` for constant s and Q.

    The first one is given, as `gradient[n, V] = s (p - Q)`: made here of p and Q, which has much of the policy, it
    would be a small difference of large numbers.
    """

    @staticmethod
    def forward(logits: Tensor, gradient: Tensor, scale: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, gradient, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody asks for the second derivative, which is that of s p
            probs = torch.softmax(logits, dim=-1)
            gradient = gradient + scale[:, None] * (probs - probs.detach())
        return grad[:, None] * gradient, None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *of_constants: Tensor | None) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return torch.linalg.vecdot(gradient, tangent)


@torch.no_grad()
def token_target(
    logits: Tensor,
    labels: Tensor,
    config: QTargetConfig | str | dict[str, Any] | None,
    prior_logits: Tensor | None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    embeddings: Tensor | None = None,
    ignore_index: int = -100,
    progress: float = 1.0,
    prior_top_k: TopKPrior | None = None,
) -> tuple[Objective, TokenTarget, Tensor]:
    """Check the arguments; return the objective, the target of the scored tokens, and their mask `[N]`."""
    # A target is a constant in forward mode too, which `no_grad` leaves on.
    logits, prior_logits, token_weights, embeddings = (
        None if value is None else value.detach() for value in (logits, prior_logits, token_weights, embeddings)
    )
    if logits.dim() != 2:
        raise ValueError(f"`logits` must have shape [N, V], got {list(logits.shape)}: flatten the leading dimensions.")
    if prior_logits is not None and prior_top_k is not None:
        raise ValueError("`prior_top_k` and `prior_logits` are two priors: pass one of them.")
    has_prior = prior_logits is not None or prior_top_k is not None
    objective = QTargetConfig.coerce(config).objective(has_prior=has_prior)
    objective = replace(objective, progress=check_progress(progress))
    labels, scored = check_labels(labels, *logits.shape, ignore_index)
    check_token_weights(token_weights, len(labels), objective)
    check_per_token("sequence_ids", sequence_ids, len(labels))
    if prior_logits is not None:
        check_prior_logits(prior_logits, logits)
        prior_logits = over_tokens(prior_logits, logits.size(1))
    if prior_top_k is not None:
        check_top_k(prior_top_k, *logits.shape)
        if objective.uses_prior:
            plan_of(objective)  # raises where such a prior is not enough
    check_embeddings(embeddings, logits.size(-1), objective)

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[scored]

    scored_logits = _to_statistics_dtype(logits[scored])
    log_probs = finite(log_softmax_(scored_logits.clone()), in_place=True)
    known, given = None, None
    if objective.uses_prior and prior_top_k is not None:
        known = prior_top_k[scored].like(log_probs)
        given = known.dense(log_probs)
    elif objective.uses_prior:
        given = finite(prior_logits[scored].to(log_probs.dtype))
    tile = Tile(
        log_probs=log_probs,
        labels=labels[scored],
        prior_logits=given,
        token_weights=rows(token_weights),
        output_embeddings=None if embeddings is None else Embeddings(embeddings, labels[scored]),
        logits=scored_logits if {"rank", "margin"} & objective.statistics else None,
    )
    if known is not None:  # the label is known apart, whether it is among the k or not
        tile.prior_label_log_probs = known.or_policy(known.label_log_probs, tile.label_log_probs)
    trust = None
    if objective.trust.per_sequence:
        prior = tile.prior_label_log_probs if objective.uses_prior else tile.label_log_probs
        statistics = LabelStatistics(tile.label_log_probs, prior, tile.token_weights, rows(sequence_ids))
        trust = objective.token_trust(statistics)
    return objective, objective.target(tile, trust), scored


def build_target(
    logits: Tensor,
    labels: Tensor,
    config: QTargetConfig | str | dict[str, Any] | None,
    *,
    prior_logits: Tensor | None = None,
    prior_top_k: TopKPrior | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    embeddings: Tensor | None = None,
    ignore_index: int = -100,
    progress: float = 1.0,
) -> Target:
    """The target distribution that a configuration makes of these logits (arXiv 2606.11189).

    Args:
        logits: `[N, V]`, the policy's logits; position `i` predicts `labels[i]` (already shifted).
        labels: `[N]`, the observed tokens. At `ignore_index`, Q is the policy itself and the scale 0: no gradient.
        config: a `QTargetConfig`, a method's name, or a dict of fields.
        prior_logits: `[N, V']`, logits of the prior. Without them `target_sft` and free combinations use the policy
            itself; every other method with a prior raises. A prior of more or fewer tokens is conditioned on the
            first `min(V, V')`, which both have: what only it has is left out and the rest renormalised, what only the
            policy has gets no prior mass.
        prior_top_k: in their place, the `K` most probable tokens of the prior.
        token_weights: `[N]`, weights of the trust `token_weights`.
        sequence_ids: `[N]`, which document a token belongs to, for per-sequence trusts; None means one sequence.
        embeddings: `[V, H]`, the output embeddings, for the residual `neighbors`.
        ignore_index: label of tokens that are not scored.
        progress: share of the training that is done, from 0 to 1, for a target that follows a schedule (`idft`).

    Returns:
        `Target(probs=[N, V], scale=[N])`, in float32 (float64 for float64 logits), without gradient.

    Raises:
        ValueError: an argument is missing, misshapen or out of range.
    """
    per_token = (token_weights, sequence_ids, embeddings)
    _, target, scored = token_target(
        logits, labels, config, prior_logits, *per_token, ignore_index, progress, prior_top_k
    )
    probs = log_softmax_(_to_statistics_dtype(logits.detach()).clone()).exp_()
    probs[scored] = target.probs()
    scale = probs.new_zeros(len(labels))
    scale[scored] = target.scale
    return Target(probs, scale)


def qtarget_loss(
    logits: Tensor,
    labels: Tensor,
    config: QTargetConfig | str | dict[str, Any] | None,
    *,
    prior_logits: Tensor | None = None,
    prior_top_k: TopKPrior | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    embeddings: Tensor | None = None,
    ignore_index: int = -100,
    progress: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The loss of a configuration on dense logits: value of the published objective, gradient `s * (p - Q)`.

    Arguments as in [`build_target`][trl_qtarget.build_target]; `reduction="mean"` divides by the number of labelled
    tokens, `"none"` returns `[N]` with zeros at `ignore_index`. If every label is ignored the loss is a differentiable
    zero.

    Raises:
        ValueError: an argument is missing, misshapen or out of range.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction={reduction!r}` is unknown: choose 'mean', 'sum' or 'none'.")
    per_token = (token_weights, sequence_ids, embeddings)
    objective, target, scored = token_target(
        logits, labels, config, prior_logits, *per_token, ignore_index, progress, prior_top_k
    )
    scored_logits = _to_statistics_dtype(logits[scored])
    with torch.no_grad():
        value, gradient = objective.value(target), target.logits_gradient()
    # The gradient is that of the cross-entropy to the detached target; the value is the publication's.
    losses = _ValueWithGradient.apply(scored_logits, gradient, target.scale, value)
    # `masked_scatter` keeps the graph connected where no token is scored.
    per_token = losses.new_zeros(len(labels)).masked_scatter(scored, losses)
    if reduction == "none":
        return per_token
    total = per_token.sum()
    return total if reduction == "sum" else total / scored.sum().clamp(min=1)


def induced_target(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """The target that any differentiable loss trains toward: `p - dL/dz` (arXiv 2606.11189).

    Args:
        loss_fn: `loss_fn(logits, labels) -> [N]`, a per-token loss; a token's loss depends on its own logits.
        logits: `[N, V]`.
        labels: `[N]`.

    Returns:
        `[N, V]`, in the dtype of `logits`. For a loss with a scale other than one this is the unit-scale target
        `p - s (p - Q)`.

    Raises:
        ValueError: `loss_fn` does not return one differentiable number per token.
    """
    logits = logits.detach().requires_grad_(True)
    with torch.enable_grad():
        losses = loss_fn(logits, labels)
    if not isinstance(losses, Tensor) or losses.shape != labels.shape:
        raise ValueError("`loss_fn` must return one loss per token, of the shape of `labels`: remove its reduction.")
    gradient = None
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), logits, allow_unused=True)
    if gradient is None:
        raise ValueError("`loss_fn` returned a loss without gradient: compute it from `logits` differentiably.")
    return torch.softmax(logits.detach(), dim=-1) - gradient
