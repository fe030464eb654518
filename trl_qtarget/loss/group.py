"""Ranks that share the sequences of a batch: each has a piece of every row, and a document may lie on several.

What a loss asks of its neighbours is little: sums, and numbers of the labels. Hidden states and logits stay where they
are.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..target.tile import LabelStatistics


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks, in the order of their pieces. Every rank has to make the same calls.

    Attributes:
        handle: torch's process group.
    """

    handle: Any

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.handle)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks, detached."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.handle)
        return value

    def with_value_of_all(self, value: Tensor) -> Tensor:
        """The sum over the ranks, whose gradient is that of this rank's own part."""
        return value + (self.total(value) - value.detach())

    def trust(self, objective: Any, labels: LabelStatistics) -> Tensor:
        """γ `[n]` of this rank's scored tokens for a per-sequence trust, which sees the labels of all ranks.

        Args:
            objective: the target's.
            labels: of this rank's scored tokens `[n]`; ranks have different numbers of them.
        """
        count = len(labels.label_log_probs)
        counts = self._gathered(labels.label_log_probs.new_tensor([count], dtype=torch.long)).flatten().tolist()
        fields = ("label_log_probs", "prior_label_log_probs", "token_weights", "sequence_ids")
        given = {name: getattr(labels, name) for name in fields if getattr(labels, name) is not None}
        whole = replace(labels, **{name: self._joined(value, counts) for name, value in given.items()})
        start = sum(counts[: dist.get_rank(self.handle)])
        return objective.token_trust(whole)[start : start + count]

    def _joined(self, values: Tensor, counts: list[int]) -> Tensor:
        """The values of all ranks, one after another."""
        padded = values.new_zeros(max(counts))
        padded[: len(values)] = values
        return torch.cat([row[:count] for row, count in zip(self._gathered(padded), counts, strict=True)])

    def _gathered(self, values: Tensor) -> Tensor:
        """`[n]` of every rank, `[ranks, n]`; all have the same `n`."""
        rows = values.new_empty(self.size, len(values))
        dist.all_gather(list(rows), values.contiguous(), group=self.handle)
        return rows
