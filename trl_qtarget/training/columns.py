"""What a target needs of a batch beside the model's inputs: columns with one number per token, and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loss.request import IGNORE_INDEX
from ..priors.cached import ROWS_KEY
from ..priors.documents import begins_of, numbers_of
from ..priors.store import PriorCache


WEIGHTS_KEY = "token_weights"
SEQUENCES_KEY = "sequence_ids"
PLACES_KEY = "prior_places"


@dataclass(frozen=True)
class TokenColumns:
    """Which per-token columns the target needs.

    Attributes:
        weights: name of the column of weights, or None.
        documents: whether documents are told apart.
        cache: what a prior has said, whose places are carried, or None.
    """

    weights: str | None = None
    documents: bool = False
    cache: PriorCache | None = None

    def __bool__(self) -> bool:
        return self.weights is not None or self.documents or self.cache is not None

    def keys(self) -> dict[str, str]:
        """Dataset column -> name in the batch."""
        keys = {self.weights: WEIGHTS_KEY} if self.weights is not None else {}
        keys |= {SEQUENCES_KEY: SEQUENCES_KEY} if self.documents else {}
        return keys | ({PLACES_KEY: ROWS_KEY} if self.cache is not None else {})


def check_batch(key: str, values: Any, labels: Tensor, label: str) -> None:
    """Raise unless a batch brings one entry per label, and no weight that is negative, NaN or infinite."""
    if values is None:
        raise ValueError(
            f"`data_collator` gave a batch without `{key}`, which {label} needs: return a float tensor of the shape "
            "of `labels` under that key."
        )
    if values.shape != labels.shape:
        raise ValueError(
            f"`data_collator` gave `{key}` of shape {list(values.shape)} for `labels` of shape {list(labels.shape)}: "
            "return one entry per label."
        )
    if values.dtype.is_floating_point and not (torch.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"`data_collator` gave `{key}` with a weight that is negative, NaN or infinite: use >= 0.")


def check_rows(rows: Tensor | None, labels: Tensor, label: str) -> None:
    """Raise unless a batch brings what the cache says of its tokens."""
    if rows is None or rows.shape[:2] != labels.shape:
        raise ValueError(
            f"`data_collator` gave a batch without `{ROWS_KEY}` for every label, which {label} reads from its "
            "`prior_cache`: leave the collator to the trainer, and the dataset to its preparation."
        )


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels `[B, T]` of a batch; a ValueError if there are none."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            "`data_collator` gave a batch without `labels`: return `input_ids` with -100 where nothing is learned, "
            "`[B, T]` and not shifted, as transformers' `DataCollatorForLanguageModeling(tokenizer, mlm=False)` does."
        )
    return labels


def count_scored(batch: Mapping[str, Any], first: bool) -> Tensor:
    """How many labels of a batch the loss scores; `first` says whether it scores the first of a row."""
    labels = batch.get("shift_labels")
    if labels is None:
        labels = labels_of(batch) if first else labels_of(batch)[:, 1:]
    return (labels != IGNORE_INDEX).sum()


def sequences_of(inputs: Mapping[str, Any]) -> Tensor:
    """Which document each token of a batch belongs to, `[B, T]`: one per row, but where the batch says more.

    It does so by `seq_idx` or by position ids that do not go on, both `[B, T]`, or by `cu_seq_lens_q` of a single row.
    """
    labels = inputs["labels"]
    rows, length = labels.shape
    row = torch.arange(rows, device=labels.device)[:, None]
    return (row * (length + 1) + _documents_of_rows(inputs, labels)).expand_as(labels)


def _documents_of_rows(inputs: Mapping[str, Any], labels: Tensor) -> Tensor | int:
    """The number of a token's document in its row; 0 where nothing tells documents apart."""
    positions, index, ends = (inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    if positions is not None and positions.dim() == 3:  # of text and image: in the text, height, width and time
        positions = positions[0] if len(positions) == 4 else None
    if index is not None:
        begins = index[:, 1:] != index[:, :-1]
    elif positions is not None:
        begins = begins_of(positions)
    elif ends is not None and len(labels) == 1:
        return torch.bucketize(torch.arange(labels.size(1), device=labels.device), ends[1:], right=True)
    else:
        return 0
    return numbers_of(begins)
