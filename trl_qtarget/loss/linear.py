"""The fused loss: hidden states times LM head, toward a target, without the `[N, V]` logits.

Loss, statistics and gradients are all computed in the forward pass, chunk by chunk (`chunks.py`); the backward pass
only multiplies by the incoming scalar.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..gemm import Head
from ..target.checks import (
    check_head,
    check_labels,
    check_num_items,
    check_per_token,
    check_progress,
    check_token_weights,
)
from ..target.config import QTargetConfig
from ..target.objective import Objective
from ..target.token_target import TokenTarget
from ..target.top_k import TopKPrior, check_top_k
from .choice import make_kernel
from .chunks import Batch
from .group import SequenceGroup


# Called with the positions `[n]` of some scored tokens among all, and their target.
Observer = Callable[[Tensor, TokenTarget], None]


@dataclass
class LinearQTargetOutput:
    """Result of [`linear_qtarget_loss`][trl_qtarget.linear_qtarget_loss].

    `loss` is a scalar with gradient. All others are `[N]`, detached, and zero where the label is ignored:

    Attributes:
        loss: sum of `token_loss` over `num_items_in_batch`.
        token_loss: the published objective of each token.
        nll: plain negative log-likelihood of the label, in nats.
        trust: γ.
        label_mass: Q(y), the probability that the target puts on the label.
        kl: KL(Q‖p) in nats; NaN where Q has negative entries, or more parts than one residual (`gem`, `mask_target`).
        entropy: entropy of the policy, in nats.
        is_top1: 1 where the label is the most probable token; among equals the first one is, as TRL counts.
        prior_is_top1: the same of the prior; NaN without one.
        scored: whether the label is not ignored (bool).
    """

    loss: Tensor
    token_loss: Tensor
    nll: Tensor
    trust: Tensor
    label_mass: Tensor
    kl: Tensor
    entropy: Tensor
    is_top1: Tensor
    prior_is_top1: Tensor
    scored: Tensor


def _kept_dtype(value: Tensor) -> torch.dtype:
    """dtype in which a gradient waits for the backward pass."""
    # An fp16 gradient only fits its dtype after it was multiplied by the loss scale, which comes with the backward.
    return torch.float32 if value.dtype == torch.float16 else value.dtype


class _PrecomputedGradient(torch.autograd.Function):
    """Attach gradients that were computed in the forward pass to a scalar loss."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [None if value is None else value.dtype for value in inputs]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "The fused loss keeps one set of gradients, which a first backward pass has already taken: compute "
                "the loss again for a second one, or use `qtarget_loss` on dense logits."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second copy of the head's gradient would double what the loss needs at its peak.
        return (
            None,
            None,
            *(
                None if gradient is None else gradient.mul_(grad_loss).to(dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )


def _refuse_forward_mode(*inputs: Tensor | None) -> None:
    # Without this a tangent would be dropped, and the derivative be zero in silence.
    if any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in inputs):
        raise RuntimeError(
            "The fused loss has no forward-mode derivative, as `torch.func.jvp` and `torch.autograd.forward_ad` ask "
            "for: use `qtarget_loss` on dense logits, or reverse mode."
        )


@torch.compiler.disable
def linear_qtarget_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: QTargetConfig | str | dict[str, Any] | None,
    *,
    bias: Tensor | None = None,
    prior_hidden: Tensor | None = None,
    prior_weight: Tensor | None = None,
    prior_bias: Tensor | None = None,
    prior_top_k: TopKPrior | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    prior_logit_scale: float = 1.0,
    prior_logit_softcap: float | None = None,
    ignore_index: int = -100,
    progress: float = 1.0,
) -> LinearQTargetOutput:
    """The loss of a configuration from hidden states and an LM head, equal to `qtarget_loss` on their logits.

    Args:
        hidden: `[N, H]`, the policy's last hidden states; position `i` predicts `labels[i]` (already shifted).
        weight: `[V, H]`, the LM head. Without `requires_grad`, the work for its gradient is left out.
        labels: `[N]`, the observed tokens; those equal to `ignore_index` are not even projected.
        config: a `QTargetConfig`, a method's name, or a dict of fields.
        bias: `[V]`, bias of the head.
        prior_hidden, prior_weight, prior_bias: `[N, H']`, `[V', H']`, `[V']`, the same of the prior, whose width H'
            may differ. Without them `target_sft` and free combinations use the policy itself; every other method with
            a prior raises. A prior of more or fewer tokens is conditioned on the first `min(V, V')`, which both have,
            as in [`build_target`][trl_qtarget.build_target]; no head is copied for it.
        prior_top_k: in their place, the `K` most probable tokens of the prior: no product with its head, and, where
            the tail is the policy's, no second buffer of logits.
        token_weights: `[N]`, weights of the trust `token_weights`.
        sequence_ids: `[N]`, which document a token belongs to, for per-sequence trusts; None means one sequence.
        num_items_in_batch: what the summed loss is divided by; None means the number of labelled tokens here.
        logit_scale, logit_softcap: the head computes `softcap · tanh(scale · logits / softcap)`.
        prior_logit_scale, prior_logit_softcap: the same of the prior's head.
        ignore_index: label of tokens that are not scored.
        progress: share of the training that is done, from 0 to 1, for a target that follows a schedule (`idft`).

    Returns:
        A [`LinearQTargetOutput`][trl_qtarget.LinearQTargetOutput] with `.loss` and per-token statistics.
        If every label is ignored the loss is a differentiable zero. With gradients disabled, none is computed.

    Raises:
        ValueError: an argument is missing, misshapen or out of range.
        RuntimeError: an input has a forward-mode tangent.
    """
    config = QTargetConfig.coerce(config)
    check_head("", hidden, weight, bias, logit_softcap)
    check_num_items(num_items_in_batch)
    if (prior_hidden is None) != (prior_weight is None):
        raise ValueError("`prior_hidden` and `prior_weight` belong together: pass both or none.")
    if prior_bias is not None and prior_hidden is None:
        raise ValueError("`prior_bias` is a bias without a head: pass `prior_hidden` and `prior_weight` with it.")
    if prior_top_k is not None and prior_hidden is not None:
        raise ValueError("`prior_top_k` and `prior_hidden` are two priors: pass one of them.")
    has_prior = prior_hidden is not None or prior_top_k is not None
    objective = replace(config.objective(has_prior=has_prior), progress=check_progress(progress))
    labels, _ = check_labels(labels, hidden.size(0), weight.size(0), ignore_index)
    check_token_weights(token_weights, len(labels), objective)
    check_per_token("sequence_ids", sequence_ids, len(labels))
    prior_head = None
    if prior_hidden is not None:
        check_head("prior_", prior_hidden, prior_weight, prior_bias, prior_logit_softcap)
        if prior_weight.size(0) == 0:
            raise ValueError("`prior_weight` has no rows, so the prior has no token: pass the prior's LM head.")
        if prior_hidden.size(0) != hidden.size(0):
            raise ValueError(f"`prior_hidden` must have one row per row of `hidden`, got {list(prior_hidden.shape)}.")
        prior_head = Head(prior_weight, prior_bias, prior_logit_scale, prior_logit_softcap)
    if prior_top_k is not None:
        check_top_k(prior_top_k, len(labels), weight.size(0))
    return fused_loss(
        objective,
        hidden,
        Head(weight, bias, logit_scale, logit_softcap),
        labels,
        prior_hidden=prior_hidden,
        prior_head=prior_head,
        prior_top_k=prior_top_k,
        token_weights=token_weights,
        sequence_ids=sequence_ids,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        chunk_tokens=config.chunk_tokens,
        kernel=config.kernel,
    )


# One operation to a compiler. Traced, its loops and checks would be dozens of graphs, and new ones for other sizes.
@torch.compiler.disable
def fused_loss(
    objective: Objective,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    prior_hidden: Tensor | None = None,
    prior_head: Head | None = None,
    prior_top_k: TopKPrior | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    kernel: str = "auto",
    observer: Observer | None = None,
    index: Tensor | None = None,
    group: SequenceGroup | None = None,
) -> LinearQTargetOutput:
    """`linear_qtarget_loss` for arguments that are known to be good, as the trainer's are.

    Labels are not checked (`check_labels_inside` does it): one outside the head is an error of the device by the plain
    kernel, and NaN in all that depends on it by Triton's.

    `index` are the positions `[n]` of the labelled tokens, where they are known already: to find them, the device has
    to finish all that it was given before. `observer` is shown the target of every block, with the positions `[n]` of
    its tokens, before the next one replaces it: so what is looked at is what is trained toward. `group` are the ranks
    that have the other pieces of the same sequences; `num_items_in_batch` is then of all of them.
    """
    _refuse_forward_mode(hidden, head.weight, head.bias)
    scored = labels != ignore_index
    index = scored.nonzero().squeeze(1) if index is None else index

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach()[index]

    given = {
        "objective": objective,
        "head": head.detach(),
        "hidden": rows(hidden),
        "labels": labels[index],
        "prior_head": prior_head.detach() if objective.uses_prior and prior_top_k is None else None,
        "prior_hidden": rows(prior_hidden) if objective.uses_prior and prior_top_k is None else None,
        "top_k": prior_top_k[index] if objective.uses_prior and prior_top_k is not None else None,
        "token_weights": rows(token_weights),
        "sequence_ids": rows(sequence_ids),
        "chunk_tokens": chunk_tokens,
        "observer": None if observer is None else lambda block, target: observer(index[block], target),
        "group": group,
    }
    batch = Batch(**given, kernel=make_kernel(kernel, given))
    count = len(index) if num_items_in_batch is None else num_items_in_batch
    if not isinstance(count, Tensor):
        count = batch.logits.new_full((), count)  # filled where it is: a copy would wait for the device
    inverse_count = 1 / count.to(batch.dtype).to(hidden.device).clamp(min=1).reshape(())

    inputs = (hidden, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and value is not None and value.requires_grad for value in inputs]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        statistics, gradients = batch.run(inverse_count, *wanted)
        loss = statistics["token_loss"].sum() * inverse_count
        if gradients[0] is not None:
            rows_of_all = gradients[0].new_zeros(hidden.shape, dtype=_kept_dtype(hidden))
            gradients[0] = rows_of_all.index_copy_(0, index, gradients[0].to(rows_of_all.dtype))
        gradients = tuple(
            None if gradient is None else gradient.to(_kept_dtype(value))
            for gradient, value in zip(gradients, inputs, strict=True)
        )
        spread = {
            name: value.new_zeros(len(labels)).index_copy_(0, index, value) for name, value in statistics.items()
        }
    if any(wanted):
        loss = _PrecomputedGradient.apply(loss, gradients, *inputs)
    return LinearQTargetOutput(loss=loss, scored=scored, **spread)
