"""The fused loss behind `model.forward`, so that every wrapper (DDP, FSDP, ZeRO, PEFT) still sees one forward.

`add_target_head(model)` makes two calls understood, both without `[N, V]` logits; any other call is unchanged:

    model(**inputs, labels=labels, qtarget=Sealed(request))  -> QTargetOutput, the loss toward the requested target
    model(**inputs, final_hidden=True)                       -> FinalHiddenOutput, what a prior needs of its model
"""

import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..gemm import Head
from ..target.objective import Objective
from .balance import load_balancing_loss
from .body import UnfitHead, head_module, module_of_product, no_logits, rows, run_body, run_head, whole
from .linear import LinearQTargetOutput, Observer, fused_loss
from .probe import LogitTransform, check_weight, logits_of, measure, probe_inputs, read_logit_transform
from .request import (
    IGNORE_INDEX,
    FinalHiddenOutput,
    NextTokens,
    PriorStates,
    QTargetOutput,
    Sealed,
    TargetRequest,
    TopKStates,
    next_token,
)


_logger = logging.getLogger(__name__)

# Where `add_target_head` keeps what it has to know of a model.
_TAUGHT = "_qtarget"
# All that it changes of a model.
CHANGED = ("forward", _TAUGHT)


@dataclass(frozen=True)
class ModelHead(Head):
    """The head of a model, perhaps sharded, of whose rows the first `vocabulary` are in use; None for all."""

    vocabulary: int | None = None


@dataclass
class _Taught:
    """What `add_target_head` keeps with a model, so that a copy of the model has a copy of it.

    `forward` is the model's own; `transform` is None until it has been measured.
    """

    forward: Callable[..., Any]
    transform: LogitTransform | None = None


def head_of(model: PreTrainedModel) -> ModelHead:
    """The LM head of a causal language model, with its logit transform; perhaps sharded (see `gathered`)."""
    head, taught = head_module(model), vars(model).get(_TAUGHT)
    measured = None if taught is None else taught.transform
    with align_module_device(module_of_product(head)):  # fetches what Accelerate has offloaded
        return _model_head(head, measured or LogitTransform(*read_logit_transform(model.config)))


def _model_head(module: nn.Module, transform: LogitTransform) -> ModelHead:
    bias = getattr(module, "bias", None)
    return ModelHead(module.weight, bias, transform.scale, transform.softcap, transform.vocabulary)


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens a model has logits of."""
    taught = vars(model).get(_TAUGHT)
    kept = None if taught is None or taught.transform is None else taught.transform.vocabulary
    return rows(head_module(model).weight) if kept is None else kept


@contextmanager
def gathered(*heads: ModelHead | None, device: torch.device | None = None) -> Iterator[list[Head | None]]:
    """The heads, whole and on `device`: those that FSDP2 or ZeRO-3 has sharded are gathered for this context."""

    def in_use(value: Tensor | None, vocabulary: int | None) -> Tensor | None:
        if value is None:
            return None
        if value.is_meta:
            raise ValueError(
                "`lm_head` of the prior's model has no values on this process: load that model with its head on a "
                "device (`device_map`)."
            )
        value = whole(value)
        return (value if vocabulary is None else value[:vocabulary]).to(device)

    weights = [value for head in heads if head is not None for value in (head.weight, head.bias)]
    with _whole_in_zero3([value for value in weights if hasattr(value, "ds_status")]):
        yield [
            head
            and Head(
                in_use(head.weight, head.vocabulary),
                in_use(head.bias, head.vocabulary),
                head.logit_scale,
                head.logit_softcap,
            )
            for head in heads
        ]


def _whole_in_zero3(parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
    """ZeRO-3's parameters, whole for this context. Those that are whole already stay so when it ends."""
    if not parameters:
        return nullcontext()
    import deepspeed  # it has made them
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Tied embeddings are in use while the head is, and two heads may share a weight: once each.
    absent = {id(value): value for value in parameters if value.ds_status != ZeroParamStatus.AVAILABLE}
    return deepspeed.zero.GatheredParameters(list(absent.values())) if absent else nullcontext()


def _right_align(values: Tensor, length: int) -> Tensor:
    """Pad `[B, T, ...]` with zeros on the left of `T`: prompt learning puts virtual tokens before the text."""
    missing = length - values.size(1)
    return F.pad(values, (0, 0) * (values.dim() - 2) + (missing, 0)) if missing else values


def _next_tokens(
    request: TargetRequest, labels: Tensor | None, shift_labels: Tensor | None, vocabulary: int
) -> NextTokens:
    if shift_labels is not None:
        return NextTokens.shifted(shift_labels.reshape(-1), vocabulary)
    known = request.next_tokens
    # Prompt learning has put virtual tokens before the text since.
    return known if known is not None and len(known.labels) == labels.numel() else NextTokens.of(labels, vocabulary)


@torch.compiler.disable
def _target_loss(
    head: ModelHead,
    hidden: Tensor,
    prior: PriorStates | TopKStates | None,
    request: TargetRequest,
    next_tokens: NextTokens,
    num_items_in_batch: Tensor | int | None,
) -> LinearQTargetOutput:
    device, length = head.weight.device, hidden.size(1)
    if len(next_tokens.labels) != hidden.size(0) * length:
        raise ValueError(
            f"The model has {list(hidden.shape[:2])} positions and there are {len(next_tokens.labels)} labels: pass "
            "labels of the shape of `input_ids`."
        )
    if prior is not None and prior.length < length:
        # The prior has no virtual token to predict the first real one from, so nothing is asked of it there.
        labels = next_tokens.labels.clone()
        labels.view(-1, length)[:, : length - prior.length] = IGNORE_INDEX
        next_tokens = NextTokens.shifted(labels)

    def per_token(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return (values.reshape(-1) if request.shifted else next_token(_right_align(values, length))).to(device)

    def of_prior(values: Tensor) -> Tensor:
        return _right_align(values, length).flatten(0, 1).to(device)

    # To `device`: a model split over devices may end on another one than its head.
    hidden = hidden.flatten(0, 1).to(device)
    prior_hidden = prior_top_k = sharded_head = None
    if isinstance(prior, TopKStates):
        prior_top_k = prior.prior.map(of_prior)
    elif prior is not None:
        prior_hidden, sharded_head = of_prior(prior.hidden), prior.head()
    with gathered(head, sharded_head, device=device) as (head, prior_head):
        of_batch = {
            "token_weights": per_token(request.token_weights),
            "sequence_ids": per_token(request.sequence_ids),
            "num_items_in_batch": num_items_in_batch,
            "ignore_index": IGNORE_INDEX,
            "chunk_tokens": request.chunk_tokens,
            "kernel": request.kernel,
            "index": next_tokens.index.to(device),
            "group": request.group,
        }
        tokens = (hidden, head, next_tokens.labels.to(device))

        def loss(objective: Objective, observer: Observer | None, policy_prior: bool = False) -> LinearQTargetOutput:
            of_prior = {"prior_hidden": prior_hidden, "prior_head": prior_head, "prior_top_k": prior_top_k}
            if policy_prior:
                of_prior = {"prior_hidden": hidden, "prior_head": head}
            return fused_loss(objective, *tokens, **of_prior, observer=observer, **of_batch)

        output = loss(request.objective, request.observer)
        with torch.no_grad():
            for other in request.observed:
                loss(other.objective, other.observer, other.policy_prior)
        return output


def _body(
    model: PreTrainedModel,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    answer: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """`run_body`, after the model's head has been looked at."""
    kwargs["use_cache"] = False
    taught: _Taught = vars(model)[_TAUGHT]
    if taught.transform is None:
        taught.transform = measure(model, taught.forward, args, kwargs)
    return run_body(model, taught.forward, args, kwargs, answer)


def _loss_in_place_of_logits(
    model: PreTrainedModel, args: Sequence[Any], kwargs: dict[str, Any], *of_batch: Any
) -> tuple[LinearQTargetOutput, Any]:
    """`_target_loss` where the head would make logits, with all that is wrapped around it; and the model's outputs."""
    head, tokens = head_module(model), None

    def product(module: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal tokens
        tokens = _target_loss(_model_head(module, vars(model)[_TAUGHT].transform), hidden, *of_batch)
        return tokens.loss

    def answer(hidden: Tensor) -> Tensor:
        return no_logits(run_head(head, hidden, product), hidden, rows(head.weight))

    _, outputs = _body(model, args, kwargs, answer)
    # Wrappers wait for the gradients of what their modules return, so the logits of no position are a part of the
    # loss. The loss itself has not passed through the wrappers' hooks, of which some round to a dtype of theirs.
    return replace(tokens, loss=tokens.loss + logits_of(outputs).sum().to(tokens.loss)), outputs


def final_hidden_states(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
    """What a model would give its head, `[B, T, H]`, past all that is wrapped around the model."""
    return _body(model, args, kwargs)[0]


def add_target_head(model: PreTrainedModel) -> None:
    """Teach a causal language model the two calls at the top of this file. Do it before the model is wrapped.

    Args:
        model: the causal language model itself, not its PEFT wrapper.

    Raises:
        ValueError: the LM head has no weight of its own, is quantised, or has an adapter.
    """
    check_weight(model)
    _take_out_fused_head(model)
    if _TAUGHT in vars(model) and "forward" in vars(model):
        return
    vars(model)[_TAUGHT] = _Taught(model.forward)
    text_config = model.config.get_text_config()

    # Bound to the model and to nothing else, so that a copy of the model runs the copy. The original signature is
    # kept: `generate` and `Trainer` look at it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget: TargetRequest | Sealed | None = None, final_hidden: bool = False, **kwargs):
        qtarget = qtarget.value if isinstance(qtarget, Sealed) else qtarget
        if qtarget is None and not final_hidden:
            return vars(self)[_TAUGHT].forward(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        shift_labels = kwargs.pop("shift_labels", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if qtarget is None:
            return FinalHiddenOutput(final_hidden_states(self, *args, **kwargs))
        next_tokens = _next_tokens(qtarget, labels, shift_labels, vocabulary_of(self))
        prior = None if qtarget.prior is None else qtarget.prior()
        of_batch = (prior, qtarget, next_tokens, num_items_in_batch)
        tokens, outputs = _loss_in_place_of_logits(self, args, kwargs, *of_batch)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            mask = kwargs.get("attention_mask")
            aux_loss = load_balancing_loss(text_config, outputs.router_logits, mask, qtarget.group)
        return QTargetOutput.of(tokens, aux_loss)

    model.forward = types.MethodType(forward, model)


def check_head(model: PreTrainedModel) -> None:
    """Look at the head of a model that `add_target_head` has taught, by a few tokens of its own.

    A model that is sharded, or that cannot be run on text alone, is looked at in its first pass.

    Raises:
        ValueError: its logits are not those that the fused loss would compute.
    """
    taught: _Taught = vars(model)[_TAUGHT]
    sharded = any(
        value.is_meta or isinstance(value, DTensor) or hasattr(value, "ds_status") for value in model.parameters()
    )
    if taught.transform is not None or sharded:
        return
    try:
        taught.transform = measure(model, taught.forward, (), dict(probe_inputs(model), use_cache=False))
    except UnfitHead:
        raise
    except Exception as error:
        _logger.debug(f"The head of {type(model).__name__} will be looked at in the first pass: {error}")


def _take_out_fused_head(model: PreTrainedModel) -> None:
    """Put back the forward that TRL's trainer has replaced: a copy of the model would run the model through it."""
    forward = getattr(vars(model).get("forward"), "__func__", None)
    if forward is None or not forward.__globals__["__name__"].startswith("trl."):
        return
    original = inspect.getclosurevars(forward).nonlocals["original_forward"]
    if getattr(original, "__func__", None) is type(model).forward:
        del vars(model)["forward"]
    else:
        vars(model)["forward"] = original
