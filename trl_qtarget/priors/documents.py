"""Rows of several documents, for a reference model that does not tell documents apart by their positions.

State-space models and those that count positions by distance (ALiBi) read a packed row as one text, so what the model
says of a document would depend on the one before. Whether a model does is measured, and then each document is a row of
its own.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..loss.probe import probe_inputs


# What says in a batch where documents begin, and what else a batch of texts consists of.
_OF_DOCUMENTS = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_OF_TEXTS = _OF_DOCUMENTS | {"input_ids", "attention_mask", "use_cache"}


def has_documents(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch says by its positions where documents begin, as packing and padding-free collators do."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    mask = inputs.get("attention_mask")
    return mask is None or (mask.dim() == 2 and bool(mask.all()))


def numbers_of(begins: Tensor) -> Tensor:
    """The number of each token's document in its row, `[B, T]`; `begins[B, T - 1]` of all tokens but the first."""
    return F.pad(begins, (1, 0)).cumsum(-1)


def begins_of(positions: Tensor) -> Tensor:
    """Where positions `[B, T]` do not go on, so that a document begins: `[B, T - 1]`, of all tokens but the first."""
    return positions[:, 1:] <= positions[:, :-1]


def accepted(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without what is said of documents to a model whose forward has no argument for it."""
    known = inspect.signature(type(model).forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in known or name not in _OF_DOCUMENTS}


@torch.no_grad()
def mixes_documents(model: PreTrainedModel, run: Callable[..., Tensor]) -> bool:
    """Whether the states of a document change with the one before it in the row. Every rank has to call it.

    Args:
        model: of which the probe's tokens are.
        run: its final hidden states `[B, T, H]` for the inputs.
    """
    ids = probe_inputs(model)["input_ids"]
    length = ids.size(1)
    row = torch.cat([ids.flip(1), ids, ids], dim=1)
    positions = torch.arange(length, device=ids.device).repeat(3)[None]
    packed = run(input_ids=row, position_ids=positions)[:, -length:].float()
    alone = run(input_ids=ids, position_ids=positions[:, :length])[:, -length:].float()
    # Far above the rounding of another order of sums, far below what another text before it would do.
    rounding = 4 * torch.finfo(model.dtype).eps ** 0.75
    return bool((packed - alone).norm() > rounding * alone.norm())


def states_of_documents(run: Callable[..., Tensor], inputs: Mapping[str, Any], at_once: bool) -> Tensor:
    """Final hidden states `[B, T, H]` with every document run as a row of its own.

    Args:
        run: the model's final hidden states for inputs.
        inputs: token ids and positions `[B, T]`, each document's from 0.
        at_once: run all documents in one padded pass, as sharded models have to: every rank makes the same passes.

    Raises:
        ValueError: the batch has more than tokens, such as images.
    """
    others = inputs.keys() - _OF_TEXTS
    if others:
        raise ValueError(
            f"`ref_model` does not tell documents apart by their positions, and packed rows with {sorted(others)} "
            "cannot be taken apart for it: set `packing=False` and `padding_free=False`."
        )
    ids, positions = inputs["input_ids"], inputs["position_ids"].expand_as(inputs["input_ids"])
    begins = (positions == 0).index_fill(1, torch.zeros(1, dtype=torch.long, device=ids.device), True).flatten()
    lengths = torch.diff(begins.nonzero().flatten(), append=begins.new_tensor([begins.numel()], dtype=torch.long))
    documents = ids.flatten().split(lengths.tolist())
    groups = [documents] if at_once else [(document,) for document in documents]
    return torch.cat([states for group in groups for states in _states(run, group)]).view(*ids.shape, -1)


def _states(run: Callable[..., Tensor], documents: tuple[Tensor, ...]) -> list[Tensor]:
    mask = pad_sequence([torch.ones_like(document) for document in documents], batch_first=True)
    hidden = run(input_ids=pad_sequence(documents, batch_first=True), attention_mask=mask)
    hidden = hidden[:, -mask.size(1) :]  # prompt learning has put virtual tokens before the text
    return [row[: len(document)] for row, document in zip(hidden, documents, strict=True)]
