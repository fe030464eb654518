"""Attention over sequences that are split over ranks, by DeepSpeed's Ulysses: what a prior's pass has to know of it.

DeepSpeed puts one function into the place of the policy's attention, which exchanges pieces of sequences for heads. It
is made for the policy's numbers of heads, and works in training mode alone: in evaluation every rank has whole rows.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .documents import begins_of, numbers_of


_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def is_split(accelerator: Accelerator) -> bool:
    """Whether sequences are split over ranks, by DeepSpeed or by ring attention."""
    parallelism = accelerator.parallelism_config
    return parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled)


def has_packed_rows(args: Any) -> bool:
    """Whether rows may hold several documents, by the arguments of a trainer."""
    return any(getattr(args, name, False) for name in ("packing", "eval_packing", "padding_free"))


def ulysses_of(accelerator: Accelerator) -> Any:
    """DeepSpeed's attention; None before the policy has been prepared."""
    name = accelerator.parallelism_config.sp_handler.sp_attn_implementation
    function = ALL_ATTENTION_FUNCTIONS[name]
    return inspect.getclosurevars(function).nonlocals.get("uattn") if inspect.isfunction(function) else None


@contextmanager
def in_pieces(accelerator: Accelerator) -> Iterator[None]:
    """Inside this context modules in evaluation mode exchange pieces too, as a prior's have to."""
    attention = ulysses_of(accelerator)
    former, attention.disable_in_eval = attention.disable_in_eval, False
    try:
        yield
    finally:
        attention.disable_in_eval = former


def tell_documents_apart(attention: Any) -> None:
    """Let attention that knows nothing of documents keep them apart by their positions.

    FlashAttention reads positions by itself. To PyTorch's own, DeepSpeed hands no mask at all.
    """
    if attention.core_attn_implementation != "sdpa" or hasattr(attention.attn, "of_documents"):
        return
    plain: Callable[..., Any] = attention.attn

    def of_documents(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args, **kwargs):
        positions = kwargs.get("position_ids")
        mask = document_mask(positions) if mask is None and positions is not None else mask
        return plain(module, query, key, value, mask, *args, **kwargs)

    of_documents.of_documents = True
    attention.attn = of_documents


def document_mask(positions: Tensor) -> Tensor:
    """Who sees whom, `[B, 1, T, T]`: a token those before it in its document, by positions `[B, T]` that go on."""
    document = numbers_of(begins_of(positions))
    causal = torch.ones(positions.size(1), positions.size(1), dtype=torch.bool, device=positions.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def check_attention(name: str, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Raise where a model's attention is not what it is on whole sequences."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    handler = accelerator.parallelism_config.sp_handler.sp_attn_implementation
    recurrent = sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind)
    if recurrent:
        raise ValueError(
            f"`{name}` has layers of the kind {recurrent[0]}, which carry a state along the sequence and begin anew "
            "on every rank under sequence parallelism: set `sp_size=1`, or pass a model of attention layers alone."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    masked = sorted(kinds - {"full_attention"}) or (["sliding_attention"] if window and not kinds else [])
    if handler == "sdpa" and masked:
        raise ValueError(
            f"`{name}` has layers of the kind {masked[0]}, and under sequence parallelism DeepSpeed hands PyTorch's "
            "own attention no mask: set `attn_implementation` and `sp_attn_implementation` to 'flash_attention_2'."
        )


def check_same_heads(reference: PreTrainedModel, policy: PreTrainedModel, accelerator: Accelerator) -> None:
    """Raise unless the attention that DeepSpeed makes for the policy is also the reference model's."""
    if not accelerator.parallelism_config.sp_enabled:
        return
    check_attention("ref_model", reference, accelerator)
    handler = accelerator.parallelism_config.sp_handler.sp_attn_implementation
    chosen = reference.config.get_text_config()._attn_implementation
    if chosen != handler:
        raise ValueError(
            f"`ref_model` computes attention by {chosen!r} and sequence parallelism is made for {handler!r}: load it "
            f"with `attn_implementation={handler!r}`."
        )
    own, others = (_heads(model) for model in (reference, policy))
    if own != others:
        raise ValueError(
            f"`ref_model` has {own} for {', '.join(_HEADS)}, and the policy has {others}: under sequence parallelism "
            "both share one attention function. Pass a model of the policy's head counts, write what the reference "
            "says into a cache first (`trl-qtarget cache`, `prior_cache`), or set `sp_size=1`."
        )


def _heads(model: PreTrainedModel) -> tuple[int, int, int]:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size
