"""A tile of tokens whose statistics the fold has gathered."""

import math
from functools import cached_property
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...target.embeddings import Embeddings
from ...target.tile import Measure, Tile, entropy_of, finite, floor_of, log_softmax_, mixed, top_values, without
from . import fold


class Shares(NamedTuple):
    """A mixture `softmax(policy · z + prior · t)`; `spared`: over all tokens but the label."""

    policy: float
    prior: float
    spared: bool = False


POLICY = Shares(1.0, 0.0)


class Asked(NamedTuple):
    """What is folded beside what every target needs: the prior's sum, statistics of a tile by name, and `spared`.

    `spared`: the policy without the label; a mixture then is without it too.
    """

    prior_sum: bool
    statistics: frozenset[str]
    spared: bool = False


class FoldedMeasure(Measure):
    """A mixture `softmax(policy · z + prior · t)` of which the statistics are known, and the tensor only if asked."""

    def __init__(self, tile: "FoldedTile", shares: Shares):
        self.tile, self.shares, self.labels = tile, shares, tile.labels

    @property
    def policy_log_probs(self) -> Tensor:
        return self.tile.log_probs

    @cached_property
    def log_probs(self) -> Tensor:
        policy, prior, spared = self.shares
        if (policy, prior) == (1.0, 0.0):
            log_probs = self.tile.log_probs
        else:
            log_probs = mixed(self.tile.log_probs, self.tile.prior_logits, policy, prior)
        return without(log_probs, self.labels) if spared else log_probs

    @cached_property
    def label_log_probs(self) -> Tensor:
        tile, (policy, prior, spared) = self.tile, self.shares
        if spared:
            return torch.full_like(tile.row(fold.LABEL_LOGIT), floor_of(tile.logits.dtype))
        label = policy * (tile.row(fold.LABEL_LOGIT) - tile.row(fold.POLICY_MAX))
        if prior:
            label = label + prior * (tile.row(fold.PRIOR_LABEL_LOGIT) - tile.row(fold.PRIOR_MAX))
        return label - tile.row(fold.MIXTURE_LOG_SUM)

    @cached_property
    def entropy(self) -> Tensor:
        row, (policy, prior, _) = self.tile.row, self.shares
        mean = policy * row(fold.MIXTURE_POLICY_MEAN)
        if prior:
            mean = mean + prior * row(fold.MIXTURE_PRIOR_MEAN)
        return row(fold.MIXTURE_LOG_SUM) - mean

    @cached_property
    def cross_entropy(self) -> Tensor:
        row = self.tile.row
        found = row(fold.POLICY_LOG_SUM) - row(fold.MIXTURE_POLICY_MEAN)
        return found + row(fold.POLICY_MAX) - row(fold.REST_MAX) if self.shares.spared else found

    def divergence_from(self, other: Measure) -> Tensor:
        if not isinstance(other, FoldedRest):
            return super().divergence_from(other)
        row = self.tile.row
        return row(fold.REST_LOG_SUM) - row(fold.MIXTURE_POLICY_MEAN) - self.entropy


class FoldedRest(Measure):
    """The policy without the label; its tensor is made only if asked for."""

    def __init__(self, tile: "FoldedTile"):
        self.tile, self.labels = tile, tile.labels

    @property
    def policy_log_probs(self) -> Tensor:
        return self.tile.log_probs

    @cached_property
    def log_probs(self) -> Tensor:
        return without(self.tile.log_probs, self.labels)

    @cached_property
    def label_log_probs(self) -> Tensor:
        return torch.full_like(self.tile.row(fold.LABEL_LOGIT), floor_of(self.tile.logits.dtype))

    def divergence_from(self, other: Measure) -> Tensor:
        # The prior's measure is this one too where the policy is its own prior.
        return torch.zeros_like(self.label_log_probs) if other is self else super().divergence_from(other)


class FoldedPolicy(FoldedMeasure):
    """The policy itself."""

    def __init__(self, tile: "FoldedTile"):
        super().__init__(tile, POLICY)

    @property
    def label_log_probs(self) -> Tensor:
        return self.tile.label_log_probs

    @cached_property
    def entropy(self) -> Tensor:
        return self.tile.row(fold.POLICY_LOG_SUM) - self.tile.row(fold.POLICY_MEAN)

    @property
    def cross_entropy(self) -> Tensor:
        return self.entropy


class FoldedTile(Tile):
    """A tile whose statistics come from the fold. `log_probs`, `probs` and the like are made when asked for."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        prior_logits: Tensor | None,
        token_weights: Tensor | None,
        embeddings: Embeddings,
        folded: Tensor,
        shares: Shares | None,
        asked: Asked,
    ):
        self.logits, self.labels, self.given_prior = logits, labels, prior_logits
        self.token_weights, self.output_embeddings = token_weights, embeddings
        self.folded, self.shares, self.asked = folded, shares, asked
        self.reuse_buffers = False

    def row(self, which: tl.constexpr) -> Tensor:
        """One of the folded statistics, `[n]`."""
        return self.folded[which.value]

    @cached_property
    def log_probs(self) -> Tensor:
        return finite(log_softmax_(self.logits.clone()), in_place=True)

    @property
    def log_sum(self) -> Tensor:
        return self.row(fold.POLICY_MAX) + self.row(fold.POLICY_LOG_SUM)

    @cached_property
    def prior_logits(self) -> Tensor:
        return self.log_probs if self.given_prior is None else finite(self.given_prior)

    @cached_property
    def policy(self) -> Measure:
        return FoldedPolicy(self)

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        if self.given_prior is None:
            policy, prior = policy + prior, 0.0
        if (policy, prior) == (1.0, 0.0):
            return self.policy
        if Shares(policy, prior) == self.shares:
            return self._mixture
        return super().mixture(policy, prior)

    def spared(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        if self.given_prior is None:
            policy, prior = policy + prior, 0.0
        if self.asked.spared and (policy, prior) == (1.0, 0.0):
            return self._rest
        if Shares(policy, prior, spared=True) == self.shares:
            return self._mixture
        return super().spared(policy, prior)

    @cached_property
    def _rest(self) -> FoldedRest:
        return FoldedRest(self)

    @cached_property
    def _mixture(self) -> FoldedMeasure:
        return FoldedMeasure(self, self.shares)

    @cached_property
    def label_log_probs(self) -> Tensor:
        row = self.row
        return row(fold.LABEL_LOGIT) - row(fold.POLICY_MAX) - row(fold.POLICY_LOG_SUM)

    @cached_property
    def prior_label_log_probs(self) -> Tensor:
        if self.given_prior is None:
            return self.label_log_probs
        if not self.asked.prior_sum:
            return self.prior_log_probs.gather(1, self.labels[:, None]).squeeze(1)
        row = self.row
        return row(fold.PRIOR_LABEL_LOGIT) - row(fold.PRIOR_MAX) - row(fold.PRIOR_LOG_SUM)

    @property
    def is_top1(self) -> Tensor:
        return self.row(fold.IS_TOP1)

    @property
    def prior_is_top1(self) -> Tensor:
        return self.row(fold.IS_TOP1 if self.given_prior is None else fold.PRIOR_IS_TOP1)

    @cached_property
    def rank(self) -> Tensor:
        return self.row(fold.RANK) if "rank" in self.asked.statistics else super().rank

    @cached_property
    def margin(self) -> Tensor:
        if "margin" in self.asked.statistics:
            return self.row(fold.LABEL_LOGIT) - self.row(fold.RIVAL)
        return super().margin

    @cached_property
    def collision(self) -> Tensor:
        return self.row(fold.COLLISION) if "collision" in self.asked.statistics else super().collision

    @property
    def largest_prob(self) -> Tensor:
        return (-self.row(fold.POLICY_LOG_SUM)).exp()

    @cached_property
    def prior_mass_below(self) -> Tensor:
        if "prior_mass_below" in self.asked.statistics and self.given_prior is not None:
            return self.row(fold.PRIOR_BELOW)
        return super().prior_mass_below

    def top_k_entropy(self, k: int) -> Tensor:
        k = min(k, self.logits.size(-1))
        return entropy_of(finite(top_values(self.logits, k))) / math.log(max(k, 2))
