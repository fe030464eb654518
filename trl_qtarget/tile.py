"""What is known about some tokens at once: a tile of log-probabilities and the statistics that designs ask for.

Statistics are computed when first asked for and kept, so a method pays only for what its own formulas read. Nothing
here carries gradients: trust, residual and scale are always stop-gradients.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor


def floor_of(dtype: torch.dtype) -> float:
    """A log-probability that stands for zero: `exp` of it is 0, and no knob's product with it overflows."""
    return torch.finfo(dtype).min / 1024


def finite(log_probs: Tensor, in_place: bool = False) -> Tensor:
    """Raise `-inf`, a masked token, to a finite floor, so that `0 * log 0` is 0 in every sum and not NaN."""
    return torch.clamp(log_probs, min=floor_of(log_probs.dtype), out=log_probs if in_place else None)


def sequence_means(values: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """Replace each of `values[N]` by the mean over its sequence; without `sequence_ids[N]` all are one sequence."""
    if sequence_ids is None:
        return values.mean().expand_as(values) if values.numel() else values
    _, index = torch.unique(sequence_ids, return_inverse=True)
    totals = torch.zeros_like(values).scatter_add_(0, index, values)
    counts = torch.zeros_like(values).scatter_add_(0, index, torch.ones_like(values))
    return (totals / counts.clamp(min=1))[index]


@dataclass
class LabelStatistics:
    """What a per-sequence trust may read: statistics of the labels alone, for every scored token of the batch.

    All are `[N]`: log-probability of the label under the policy and under the prior (nats), weights, sequence ids.
    """

    label_log_probs: Tensor
    prior_label_log_probs: Tensor | None = None
    token_weights: Tensor | None = None
    sequence_ids: Tensor | None = None

    @property
    def label_probs(self) -> Tensor:
        return self.label_log_probs.exp()

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean of `values[N]` over the sequence that each token belongs to, `[N]`."""
        return sequence_means(values, self.sequence_ids)


@dataclass
class Measure:
    """A distribution over the vocabulary, beside the policy it is compared with.

    `log_probs[n, V]` holds a low finite number (`floor_of`) where the probability is zero, never `-inf`.
    """

    log_probs: Tensor
    policy_log_probs: Tensor
    labels: Tensor

    @cached_property
    def probs(self) -> Tensor:
        return self.log_probs.exp()

    @cached_property
    def label_probs(self) -> Tensor:
        return self.log_probs.gather(1, self.labels[:, None]).squeeze(1).exp()

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy `[n]` of the measure, in nats."""
        return -torch.linalg.vecdot(self.probs, self.log_probs)

    @cached_property
    def cross_entropy(self) -> Tensor:
        """Cross-entropy `[n]` from the measure to the policy, in nats."""
        return -torch.linalg.vecdot(self.probs, self.policy_log_probs)


@dataclass
class Tile:
    """Policy and prior on `n` scored tokens.

    Attributes:
        log_probs: `[n, V]`, log-softmax of the policy's logits.
        labels: `[n]`, the observed tokens.
        prior_logits: `[n, V]` or None, logits of the prior, up to a constant per row.
        token_weights: `[n]` or None, the dataset's per-token weights.
        embeddings: `[V, H]` or None, the output embeddings.
        reuse_buffers: whether `prior_logits` may be overwritten by its own log-softmax.
    """

    log_probs: Tensor
    labels: Tensor
    prior_logits: Tensor | None = None
    token_weights: Tensor | None = None
    embeddings: Tensor | None = None
    reuse_buffers: bool = field(default=False, repr=False)

    def measure(self, log_probs: Tensor) -> Measure:
        """The distribution with these `log_probs[n, V]`."""
        return Measure(log_probs, self.log_probs, self.labels)

    @cached_property
    def policy(self) -> Measure:
        """The policy's own distribution."""
        return self.measure(self.log_probs)

    @property
    def probs(self) -> Tensor:
        """`[n, V]`, the policy's probabilities."""
        return self.policy.probs

    @cached_property
    def label_log_probs(self) -> Tensor:
        """`[n]`, log-probability of the label under the policy."""
        return self.log_probs.gather(1, self.labels[:, None]).squeeze(1)

    @cached_property
    def label_probs(self) -> Tensor:
        """`[n]`, probability of the label under the policy."""
        return self.label_log_probs.exp()

    @cached_property
    def prior_log_probs(self) -> Tensor:
        """`[n, V]`, log-softmax of the prior's logits."""
        out = self.prior_logits if self.reuse_buffers else None
        return torch.log_softmax(self.prior_logits, dim=-1, out=out)

    @cached_property
    def prior_label_log_probs(self) -> Tensor:
        """`[n]`, log-probability of the label under the prior."""
        return self.prior_log_probs.gather(1, self.labels[:, None]).squeeze(1)

    @property
    def is_top1(self) -> Tensor:
        """`[n]`, whether no other token is more probable than the label."""
        return self.label_log_probs >= self.log_probs.amax(dim=-1)

    def top_k_entropy(self, k: int) -> Tensor:
        """`[n]`, entropy of the `k` most probable tokens, renormalised among themselves, divided by `ln k`."""
        k = min(k, self.log_probs.size(-1))
        top = torch.log_softmax(self.log_probs.topk(k, dim=-1, sorted=False).values, dim=-1)
        return -(top.exp() * top).sum(-1) / torch.log(torch.tensor(float(k), dtype=top.dtype))

    @property
    def sequence_mean(self) -> NoReturn:
        """No mean over sequences here: a tile has some tokens of a document, and they would be taken for all."""
        raise ValueError(
            "`sequence_mean` is not known to a tile, which holds only some tokens of a document: register the trust "
            "with `per_sequence=True`, and it gets the `LabelStatistics` of the whole batch."
        )
