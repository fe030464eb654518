"""The fused loss behind `model.forward`, so that every wrapper (DDP, FSDP, ZeRO, PEFT) still sees one forward.

`add_target_head(model)` makes two calls understood, both without `[N, V]` logits; any other call is unchanged:

    model(**inputs, labels=labels, qtarget=request)  -> QTargetOutput, the loss toward the requested target
    model(**inputs, final_hidden=True)               -> FinalHiddenOutput, what a prior needs of its model
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..gemm import Head
from ..target.methods import Objective
from .linear import LinearQTargetOutput, Observer, fused_loss


IGNORE_INDEX = -100


@dataclass
class PriorStates:
    """What a prior says about a batch: its final hidden states `[B, T, H']` and its LM head.

    `head` is called when the loss is computed, so that a sharded head is whole for no longer than that.
    """

    hidden: Tensor
    head: Callable[[], Head]


@dataclass
class NextTokens:
    """The label of every position, already shifted, `[B·T]`, and the positions `[n]` of those that are not ignored.

    To find the positions, the device has to finish all that it was given before: do it before a forward pass.
    """

    labels: Tensor
    index: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "NextTokens":
        """Of `labels[B, T]` as a collator makes them: entry `t + 1` is what position `t` predicts."""
        return cls.shifted(_next_token(labels, IGNORE_INDEX))

    @classmethod
    def shifted(cls, labels: Tensor) -> "NextTokens":
        """Of labels that are shifted already, flattened to `[B·T]`."""
        return cls(labels, (labels != IGNORE_INDEX).nonzero().squeeze(1))


@dataclass
class Observed:
    """A target that is only looked at, beside the one that is trained toward and in the same forward pass.

    `policy_prior`: whether the policy itself stands in for the prior.
    """

    objective: Objective
    observer: Observer
    policy_prior: bool = False


@dataclass
class TargetRequest:
    """What the loss needs beside the model's inputs.

    `token_weights` and `sequence_ids` are `[B, T]`, aligned with the labels before the shift. `prior` is called inside
    the model's forward, before the policy's own pass. `next_tokens` are the labels, for a prior that runs before that
    forward. `observer` sees every token's target; positions count the flattened `[B·T]` of the batch. After that, each
    of `observed` has its turn.
    """

    objective: Objective
    prior: Callable[[], PriorStates] | None = None
    token_weights: Tensor | None = None
    sequence_ids: Tensor | None = None
    chunk_tokens: int | None = None
    kernel: str = "auto"
    observer: Observer | None = None
    next_tokens: NextTokens | None = None
    observed: Sequence[Observed] = ()


@dataclass
class QTargetOutput(ModelOutput):
    """Loss toward the target, the statistics of every position, and the load-balancing loss of a MoE model."""

    loss: Tensor | None = None
    tokens: LinearQTargetOutput | None = None
    aux_loss: Tensor | None = None


@dataclass
class FinalHiddenOutput(ModelOutput):
    """Final hidden states `[B, T, H]`, before the LM head."""

    last_hidden_state: Tensor | None = None


def read_logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Scale and soft-cap that a model applies to its logits, read from the same config attributes as TRL reads."""
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scale = getattr(config, "logits_scaling", None)
        # Granite and MiniCPM3 divide by `logits_scaling`, HyperCLOVA X multiplies by it.
        if scale is not None and config.model_type != "hyperclovax":
            scale = 1 / scale
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


def head_of(model: PreTrainedModel) -> Head:
    """The LM head of a causal language model, with its logit transform; perhaps sharded (see `gathered`)."""
    embeddings = model.get_output_embeddings()
    return Head(embeddings.weight, getattr(embeddings, "bias", None), *read_logit_transform(model.config))


@contextmanager
def gathered(*heads: Head | None) -> Iterator[list[Head | None]]:
    """The heads, whole: those that FSDP2 or ZeRO-3 has sharded are gathered for the time of this context."""

    def whole(value: Tensor | None) -> Tensor | None:
        return value.full_tensor() if isinstance(value, DTensor) else value

    weights = [value for head in heads if head is not None for value in (head.weight, head.bias)]
    parameters = [value for value in weights if hasattr(value, "ds_status")]
    with maybe_gather_lm_head_ctx(*parameters):
        yield [head and replace(head, weight=whole(head.weight), bias=whole(head.bias)) for head in heads]


def _load_balancing_loss(config: PretrainedConfig, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)


def _right_align(values: Tensor, length: int) -> Tensor:
    """Pad `[B, T, ...]` with zeros on the left of `T`: prompt learning puts virtual tokens before the text."""
    missing = length - values.size(1)
    return F.pad(values, (0, 0) * (values.dim() - 2) + (missing, 0)) if missing else values


def _next_token(values: Tensor, fill: float = 0) -> Tensor:
    """Align `[B, T]` with the positions that predict: entry `t + 1` moves to `t`; flattened to `[B·T]`."""
    return F.pad(values[:, 1:], (0, 1), value=fill).reshape(-1)


def _next_tokens(request: TargetRequest, labels: Tensor | None, shift_labels: Tensor | None) -> NextTokens:
    if shift_labels is not None:
        return NextTokens.shifted(shift_labels.reshape(-1))
    known = request.next_tokens
    # Prompt learning has put virtual tokens before the text since.
    return known if known is not None and len(known.labels) == labels.numel() else NextTokens.of(labels)


def _target_loss(
    model: PreTrainedModel,
    hidden: Tensor,
    prior: PriorStates | None,
    request: TargetRequest,
    next_tokens: NextTokens,
    num_items_in_batch: Tensor | int | None,
) -> LinearQTargetOutput:
    head = head_of(model)
    device, length = head.weight.device, hidden.size(1)
    if prior is not None and prior.hidden.size(1) < length:
        # The prior has no virtual token to predict the first real one from, so nothing is asked of it there.
        labels = next_tokens.labels.clone()
        labels.view(-1, length)[:, : length - prior.hidden.size(1)] = IGNORE_INDEX
        next_tokens = NextTokens.shifted(labels)

    def per_token(values: Tensor | None) -> Tensor | None:
        return None if values is None else _next_token(_right_align(values, length)).to(device)

    # To `device`: a model split over devices may end on another one than its head.
    hidden = hidden.flatten(0, 1).to(device)
    prior_hidden = None
    if prior is not None:
        prior_hidden = _right_align(prior.hidden, length).flatten(0, 1).to(device)
    with gathered(head, prior and prior.head()) as (head, prior_head):
        of_batch = {
            "token_weights": per_token(request.token_weights),
            "sequence_ids": per_token(request.sequence_ids),
            "num_items_in_batch": num_items_in_batch,
            "ignore_index": IGNORE_INDEX,
            "chunk_tokens": request.chunk_tokens,
            "kernel": request.kernel,
            "index": next_tokens.index.to(device),
        }
        tokens = (hidden, head, next_tokens.labels.to(device))

        def loss(objective: Objective, observer: Observer | None, policy_prior: bool = False) -> LinearQTargetOutput:
            states, of_prior = (hidden, head) if policy_prior else (prior_hidden, prior_head)
            return fused_loss(
                objective, *tokens, prior_hidden=states, prior_head=of_prior, observer=observer, **of_batch
            )

        output = loss(request.objective, request.observer)
        with torch.no_grad():
            for other in request.observed:
                loss(other.objective, other.observer, other.policy_prior)
        return output


def add_target_head(model: PreTrainedModel) -> None:
    """Teach a causal language model the two calls at the top of this file. Do it before the model is wrapped.

    Args:
        model: the causal language model itself, not its PEFT wrapper.

    Raises:
        ValueError: if the LM head has an adapter of its own, which products with its weight would leave out.
    """
    if hasattr(model.get_output_embeddings(), "base_layer"):  # PEFT's mark of an adapted layer
        raise ValueError(
            f"`lm_head` of this {type(model).__name__} has a PEFT adapter, which the fused loss would leave out: take "
            "it out of `target_modules`, or train it whole with `modules_to_save`. If the model is a `ref_model`, "
            "pass `ref_model.merge_and_unload()`."
        )
    original_forward = model.forward
    text_config = model.config.get_text_config()

    # The original signature is kept: `generate` and `Trainer` look at it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget: TargetRequest | None = None, final_hidden: bool = False, **kwargs):
        if qtarget is None and not final_hidden:
            return original_forward(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        shift_labels = kwargs.pop("shift_labels", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        next_tokens = None if qtarget is None else _next_tokens(qtarget, labels, shift_labels)
        prior = qtarget.prior() if qtarget is not None and qtarget.prior is not None else None
        # Looked up on each call: FSDP and PEFT replace the backbone after this function has run.
        outputs = self.base_model(*args, **kwargs)
        if qtarget is None:
            return FinalHiddenOutput(outputs.last_hidden_state)
        tokens = _target_loss(self, outputs.last_hidden_state, prior, qtarget, next_tokens, num_items_in_batch)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(text_config, outputs.router_logits, kwargs.get("attention_mask"))
        # A copy: PEFT's AdaLoRA adds to it in place.
        return QTargetOutput(loss=tokens.loss.clone(), tokens=tokens, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)
