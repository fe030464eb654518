"""What a batch carries for the loss beside the model's inputs, taken out of it: of whole rows or of pieces of them."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..loss.request import NextTokens
from ..priors.cached import ROWS_KEY
from ..priors.store import PriorCache
from .columns import PLACES_KEY, SEQUENCES_KEY, WEIGHTS_KEY, check_batch, check_rows, labels_of, sequences_of


# Before the name of a column whose entry is moved to the token before, as in transformers' `shift_labels`.
SHIFT = "shift_"
# What stands where nothing follows.
_FILL = {WEIGHTS_KEY: 0.0, SEQUENCES_KEY: 0, PLACES_KEY: -1}
ALL_KEYS = (*_FILL, ROWS_KEY, *(SHIFT + key for key in _FILL))


def shifted(key: str, values: Tensor) -> Tensor:
    """A column `[B, T]` with every entry at the token that is before its own."""
    return F.pad(values[:, 1:], (0, 1), value=_FILL[key])


def exact_weights(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The weights of a batch, on a device and in their own dtype: DeepSpeed's is for what the model computes with."""
    return {key: inputs[key].to(device) for key in (WEIGHTS_KEY, SHIFT + WEIGHTS_KEY) if key in inputs}


def is_piece(inputs: Any) -> bool:
    """Whether a batch is a piece of its sequences, of which the neighbours have the rest."""
    return "labels" not in inputs and "shift_labels" in inputs


@dataclass(frozen=True)
class LossColumns:
    """The columns of a batch, on its device.

    Attributes:
        weights, sequences: `[B, T]`, aligned with the labels, or with the tokens before them where `shifted`.
        next_tokens: the labels, found out of the batch.
        shifted: see `weights`.
    """

    weights: Tensor | None
    sequences: Tensor | None
    next_tokens: NextTokens
    shifted: bool


def take_columns(
    inputs: MutableMapping[str, Any],
    label: str,
    vocabulary: int,
    *,
    weights: bool = False,
    sequences: bool = False,
    cache: PriorCache | None = None,
) -> LossColumns:
    """Take the columns out of a batch; what the cache says of its tokens stays, `[B, T, W]`, each at the token before.

    Args:
        inputs: the batch. Labels stay.
        label: of the target, for messages.
        vocabulary: how many tokens the policy knows.
        weights, sequences: whether the target reads them.
        cache: what a prior has said before.

    Raises:
        ValueError: a column is missing or does not fit the labels, or a label is no token.
    """
    is_shifted = any(SHIFT + key in inputs for key in _FILL) or is_piece(inputs)
    labels = inputs["shift_labels"] if is_piece(inputs) else labels_of(inputs)
    found = {key: inputs.pop(SHIFT + key, inputs.pop(key, None)) for key in _FILL}
    if weights:
        check_batch(WEIGHTS_KEY, found[WEIGHTS_KEY], labels, label)
    if sequences:
        if found[SEQUENCES_KEY] is None and not is_shifted:
            found[SEQUENCES_KEY] = sequences_of(inputs)
        check_batch(SEQUENCES_KEY, found[SEQUENCES_KEY], labels, label)
    if cache is not None:
        rows = inputs.get(ROWS_KEY)
        if found[PLACES_KEY] is not None:
            rows = cache.read(found[PLACES_KEY].cpu()).to(labels.device)
        check_rows(rows, labels, label)
        inputs[ROWS_KEY] = rows if is_shifted else F.pad(rows[:, 1:], (0, 0, 0, 1))
    if is_piece(inputs):
        next_tokens = NextTokens.shifted(labels.reshape(-1), vocabulary)
    else:
        next_tokens = NextTokens.of(labels, vocabulary)
    return LossColumns(found[WEIGHTS_KEY], found[SEQUENCES_KEY], next_tokens, is_shifted)
