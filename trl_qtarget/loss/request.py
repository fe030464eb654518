"""What a forward pass is asked for beside the model's inputs, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..gemm import Head
from ..target.checks import check_labels_inside
from ..target.objective import Objective
from ..target.top_k import TopKPrior
from .group import SequenceGroup
from .linear import LinearQTargetOutput, Observer


IGNORE_INDEX = -100


def next_token(values: Tensor, fill: float = 0) -> Tensor:
    """Align `[B, T]` with the positions that predict: entry `t + 1` moves to `t`; flattened to `[B·T]`."""
    return F.pad(values[:, 1:], (0, 1), value=fill).reshape(-1)


@dataclass
class PriorStates:
    """What a prior says about a batch: its final hidden states `[B, T, H']` and its LM head.

    `head` is called when the loss is computed, so that a sharded head is whole for no longer than that.
    """

    hidden: Tensor
    head: Callable[[], Head]

    @property
    def length(self) -> int:
        """How many positions of a row it speaks of: T."""
        return self.hidden.size(1)


@dataclass
class TopKStates:
    """What a prior says about a batch in another way: a top-k prior of every position, its tensors `[B, T, ...]`."""

    prior: TopKPrior

    @property
    def length(self) -> int:
        """How many positions of a row it speaks of: T."""
        return self.prior.ids.size(1)


@dataclass
class NextTokens:
    """The label of every position, already shifted, `[B·T]`, and the positions `[n]` of those that are not ignored.

    To find the positions, the device has to finish all that it was given before: do it before a forward pass.
    """

    labels: Tensor
    index: Tensor

    @classmethod
    def of(cls, labels: Tensor, vocabulary: int | None = None) -> "NextTokens":
        """Of `labels[B, T]` as a collator makes them: entry `t + 1` is what position `t` predicts."""
        return cls.shifted(next_token(labels, IGNORE_INDEX), vocabulary)

    @classmethod
    def shifted(cls, labels: Tensor, vocabulary: int | None = None) -> "NextTokens":
        """Of labels that are shifted already, flattened to `[B·T]`; a ValueError if one is outside the vocabulary."""
        index = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if vocabulary is not None:
            check_labels_inside(labels, index, vocabulary, IGNORE_INDEX)
        return cls(labels, index)


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

    `token_weights` and `sequence_ids` are `[B, T]`, aligned with the labels before the shift, or after it where
    `shifted` says so. `group` are the ranks that have the other pieces of the same sequences. `prior` is called inside
    the model's forward, before the policy's own pass. `next_tokens` are the labels, for a prior that runs before that
    forward. `observer` sees every token's target; positions count the flattened `[B·T]` of the batch. After that, each
    of `observed` has its turn.
    """

    objective: Objective
    prior: Callable[[], PriorStates | TopKStates] | None = None
    token_weights: Tensor | None = None
    sequence_ids: Tensor | None = None
    chunk_tokens: int | None = None
    kernel: str = "auto"
    observer: Observer | None = None
    next_tokens: NextTokens | None = None
    observed: Sequence[Observed] = ()
    shifted: bool = False
    group: SequenceGroup | None = None


class Sealed:
    """A value that wrappers hand on as it is: FSDP2 takes dataclasses apart and rounds their tensors."""

    def __init__(self, value: Any):
        self.value = value


@dataclass
class QTargetOutput(ModelOutput):
    """Loss toward the target with the statistics of every position, and the load-balancing loss of a MoE model.

    `loss` is what the wrappers of the model see, may round and may add to, as PEFT's AdaLoRA does: a zero that hangs
    on the loss, so that they know of its backward pass. The loss itself is `tokens.loss`; add both.
    """

    loss: Tensor | None = None
    sealed: Sealed | None = None

    @classmethod
    def of(cls, tokens: LinearQTargetOutput, aux_loss: Tensor | None) -> "QTargetOutput":
        return cls(tokens.loss.reshape(1)[:0].sum(), Sealed((tokens, aux_loss)))

    @property
    def tokens(self) -> LinearQTargetOutput:
        return self.sealed.value[0]

    @property
    def aux_loss(self) -> Tensor | None:
        return self.sealed.value[1]


@dataclass
class FinalHiddenOutput(ModelOutput):
    """Final hidden states `[B, T, H]`, before the LM head."""

    last_hidden_state: Tensor | None = None
