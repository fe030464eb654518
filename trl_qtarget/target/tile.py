"""What is known about some tokens at once: a tile of log-probabilities and the statistics that designs ask for.

Statistics are computed when first asked for and kept, so a method pays only for what its own formulas read. Nothing
here carries gradients: trust, residual and scale are always stop-gradients.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .embeddings import Embeddings


# Times a smaller share, the floor that stands for a probability of zero is too near to the other logarithms.
SMALLEST_SHARE = 1e-6


def floor_of(dtype: torch.dtype) -> float:
    """A log-probability that stands for zero: `exp` of it is 0, and a sum over a million tokens does not overflow."""
    return torch.finfo(dtype).min / 2**20


def log_softmax_(scores: Tensor) -> Tensor:
    """Log-softmax of `scores[n, V]` over the last dimension, in place."""
    scores.sub_(scores.amax(dim=-1, keepdim=True))
    return scores.sub_(scores.exp().sum(dim=-1, keepdim=True).log_())


def log_softmax_and_probs(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of `scores[n, V]` over the last dimension, in place; its exponential, new; and the log-sum `[n]`.

    PyTorch's own adds up a row in few long sums on a CPU. In float32, beside a token that has nearly all of the mass,
    those of a large vocabulary lose 1.5e-5 nats, which is percents of the loss of a token that is nearly certain.
    """
    top = scores.amax(dim=-1, keepdim=True)
    probs = scores.sub_(top).exp()
    total = probs.sum(dim=-1, keepdim=True)
    log_total = total.log()
    return scores.sub_(log_total), probs.div_(total), (top + log_total).squeeze(-1)


def finite(log_probs: Tensor, in_place: bool = False) -> Tensor:
    """Raise `-inf`, a masked token, to a finite floor, so that `0 * log 0` is 0 in every sum and not NaN."""
    return torch.clamp(log_probs, min=floor_of(log_probs.dtype), out=log_probs if in_place else None)


def over_tokens(prior_logits: Tensor, vocabulary: int) -> Tensor:
    """A prior's `prior_logits[n, V']` over a policy's V tokens, `[n, V]`: the first V, and `-inf` for missing ones.

    So the prior is conditioned on the tokens that both have: their softmax leaves out what the policy has no row for,
    renormalised, and gives nothing to what the prior has no row for.
    """
    shared, missing = prior_logits[:, :vocabulary], max(0, vocabulary - prior_logits.size(1))
    return F.pad(shared, (0, missing), value=-math.inf) if missing else shared


def power_of(log_probs: Tensor, share: float) -> Tensor:
    """`share · log_probs` for a share >= 0: logarithms of a power, in which zero stays zero at every share > 0."""
    powers = log_probs * share
    return powers if share >= SMALLEST_SHARE else _zeros_kept(powers, (log_probs, share))


def _zeros_kept(powers: Tensor, *factors: tuple[Tensor, float]) -> Tensor:
    """Put the floor back, in place, where one of some log-probabilities with a share > 0 stands for zero."""
    floor = floor_of(powers.dtype)
    for log_probs, share in factors:
        if share > 0:
            powers.masked_fill_(log_probs <= floor / 2, floor)
    return powers


def _normalised(scores: Tensor, zero: float) -> Tensor:
    """Log-softmax of `scores[n, V]`, over them; NaN in a row without a score above `zero`, which is no distribution.

    PyTorch's softmax of a row of `-inf` is NaN too. An even chance for all would be an answer nobody gave.
    """
    impossible = scores.amax(dim=-1, keepdim=True) <= zero
    scores[:, :1].masked_fill_(impossible, math.nan)
    return log_softmax_(scores)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax of `logits[n, V] / temperature`, finite for every temperature > 0; NaN in a row of zeros alone."""
    floor, top = floor_of(logits.dtype), logits.amax(dim=-1, keepdim=True)
    top.masked_fill_(top <= floor, math.nan)
    # From the largest logit, so that a tiny temperature leaves 0 there and at worst -inf elsewhere; a temperature that
    # the dtype rounds to zero would make NaN of that 0.
    shifted = (logits - top).div_(max(temperature, torch.finfo(logits.dtype).tiny))
    if temperature > 1 / SMALLEST_SHARE:
        _zeros_kept(shifted, (logits, 1.0))
    return finite(log_softmax_(shifted), in_place=True)


def mixed(policy_logits: Tensor, prior_logits: Tensor | None, policy: float, prior: float) -> Tensor:
    """Log-softmax of `policy · policy_logits[n, V] + prior · prior_logits[n, V]`, both finite, for shares >= 0.

    NaN in rows where no token is possible under all that has a share.
    """
    if policy == 0 == prior:
        return torch.full_like(policy_logits, -math.log(policy_logits.size(-1)))
    if policy == 0 or prior == 0:
        return tempered(prior_logits, 1 / prior) if policy == 0 else tempered(policy_logits, 1 / policy)
    smallest, floor = min(policy, prior), floor_of(policy_logits.dtype)
    if smallest < SMALLEST_SHARE:
        both = torch.mul(policy_logits, policy).add_(prior_logits, alpha=prior)
        return _normalised(_zeros_kept(both, (policy_logits, policy), (prior_logits, prior)), floor / 2)
    if policy == 1 - prior:
        both = torch.lerp(policy_logits, prior_logits, prior)
    else:
        both = torch.mul(policy_logits, policy).add_(prior_logits, alpha=prior)
    log_probs = _normalised(both, min(smallest, 1.0) * floor / 2)
    return finite(log_probs, in_place=True) if policy + prior > 1 else log_probs  # a floor times more may be -inf


def _is_first_of_largest(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label's is the first of the largest of `logits[n, V]`; it is not where they are NaN or all zeros."""
    possible = logits.gather(1, labels[:, None]).squeeze(1) > floor_of(logits.dtype)
    return (logits.argmax(dim=-1) == labels) & possible


def top_values(values: Tensor, k: int) -> Tensor:
    """The `k` largest of every row of `values[n, V]`, in no order, `[n, k]`."""
    return values.topk(k, dim=-1, sorted=False).values


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy `[n]`, in nats, of the softmax of every row of finite `logits[n, k]`; NaN for a row of zeros alone."""
    log_probs = _normalised(logits.clone(), floor_of(logits.dtype))
    return -(log_probs.exp() * log_probs).sum(-1)


# Of logits and not of their log-softmax, which is rounded anew: tokens that differ there may be equal here.


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of every row of `logits[n, V]` are at least the label's, `[n]`, in the dtype of the logits."""
    return (logits >= logits.gather(1, labels[:, None])).sum(-1).to(logits.dtype)


def margin_of(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the label's of `logits[n, V]` exceeds the largest other one, `[n]`."""
    others = logits.scatter(1, labels[:, None], floor_of(logits.dtype))
    return finite(logits.gather(1, labels[:, None]).squeeze(1) - others.amax(-1))


def odds_below(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability `[n]` of the tokens whose finite `logits[n, V]` are below the label's, divided by the label's."""
    behind = logits.gather(1, labels[:, None]) - logits
    return F.threshold_(behind, 0.0, math.inf).neg_().exp_().sum(-1)  # one tensor of that size, and no mask beside it


def without(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities `[n, V]` of a distribution without the label, renormalised among the other tokens."""
    floor = floor_of(log_probs.dtype)
    others = log_probs.scatter(1, labels[:, None], floor)
    return finite(log_softmax_(others), in_place=True)


def sequence_means(values: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """Replace each of `values[N]` by the mean over its sequence; without `sequence_ids[N]` all are one sequence."""
    if sequence_ids is None:
        return values.mean().expand_as(values) if values.numel() else values
    # Numbered by sorting: `torch.unique` would have the host wait for the number of sequences.
    ordered, order = sequence_ids.sort(stable=True)
    number = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0)).cumsum(0) if len(ordered) else ordered.long()
    index = torch.empty_like(number).scatter_(0, order, number)
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
    progress: float = 1.0

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
    def label_log_probs(self) -> Tensor:
        return self.log_probs.gather(1, self.labels[:, None]).squeeze(1)

    @property
    def label_probs(self) -> Tensor:
        return self.label_log_probs.exp()

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy `[n]` of the measure, in nats."""
        return -torch.linalg.vecdot(self.probs, self.log_probs)

    @cached_property
    def cross_entropy(self) -> Tensor:
        """Cross-entropy `[n]` from the measure to the policy, in nats."""
        return -torch.linalg.vecdot(self.probs, self.policy_log_probs)

    def divergence_from(self, other: "Measure") -> Tensor:
        """KL `[n]` of this measure from another one, in nats."""
        return torch.linalg.vecdot(self.probs, self.log_probs - other.log_probs)


@dataclass
class Tile:
    """Policy and prior on `n` scored tokens.

    Attributes:
        log_probs: `[n, V]`, log-softmax of the policy's logits.
        labels: `[n]`, the observed tokens.
        prior_logits: `[n, V]`, logits of the prior, up to a constant per row; without them the prior is the policy.
        token_weights: `[n]` or None, the dataset's per-token weights.
        progress: share of the training that is done, from 0 to 1.
        output_embeddings: the output embeddings, or None; `embeddings` is their matrix.
        reuse_buffers: whether `prior_logits` may be overwritten by its own log-softmax.
        logits: `[n, V]`, logits of the policy, for what is compared exactly; without them `log_probs`.
        log_sum: `[n]`, log-sum of the logits that `log_probs` were made of, where somebody has kept it.
    """

    log_probs: Tensor
    labels: Tensor
    prior_logits: Tensor | None = None
    token_weights: Tensor | None = None
    output_embeddings: Embeddings | None = None
    reuse_buffers: bool = field(default=False, repr=False)
    progress: float = 1.0
    logits: Tensor | None = field(default=None, repr=False)
    log_sum: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.prior_logits is None:
            self.prior_logits = self.log_probs
        if self.logits is None:
            self.logits = self.log_probs

    def measure(self, log_probs: Tensor) -> Measure:
        """The distribution with these `log_probs[n, V]`."""
        return Measure(log_probs, self.log_probs, self.labels)

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        """The distribution ∝ p^policy · π_prior^prior: tempered, sharpened, guided, uniform (both 0).

        What is written as such a mixture never becomes a tensor in the device kernels.
        """
        if self.prior_logits is self.log_probs:
            policy, prior = policy + prior, 0.0
        if (policy, prior) == (1.0, 0.0):
            return self.policy
        if (policy, prior) == (0.0, 1.0):
            return self.measure(self.prior_log_probs)
        return self.measure(mixed(self.log_probs, self.prior_logits, policy, prior))

    def spared(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        """That mixture without the label, renormalised among the other tokens."""
        return self.measure(without(self.mixture(policy, prior).log_probs, self.labels))

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
        if self.prior_logits is self.log_probs:
            return self.log_probs
        logits = self.prior_logits if self.reuse_buffers else self.prior_logits.clone()
        return _normalised(logits, floor_of(logits.dtype))

    @cached_property
    def prior_label_log_probs(self) -> Tensor:
        """`[n]`, log-probability of the label under the prior."""
        return self.prior_log_probs.gather(1, self.labels[:, None]).squeeze(1)

    @property
    def embeddings(self) -> Tensor | None:
        """`[V, H]`, the output embeddings."""
        return None if self.output_embeddings is None else self.output_embeddings.weight

    def nearest(self, k: int) -> tuple[Tensor, Tensor]:
        """Cosine similarities and ids, both `[n, k]`, of the tokens nearest to the label in the output embeddings.

        The label itself is left out; a vocabulary that is too small gives all others.
        """
        return self.output_embeddings.nearest(self.labels, min(k, self.log_probs.size(-1) - 1), self.log_probs.dtype)

    @property
    def is_top1(self) -> Tensor:
        """`[n]`, whether the label is the most probable token; among equals the first one is, as TRL counts."""
        return _is_first_of_largest(self.log_probs, self.labels)

    @property
    def prior_is_top1(self) -> Tensor:
        """`[n]`, whether the label is the prior's most probable token."""
        return _is_first_of_largest(self.prior_logits, self.labels)

    @cached_property
    def rank(self) -> Tensor:
        """`[n]`, how many tokens are at least as probable as the label, itself included (arXiv 2602.01745)."""
        return rank_of(self.logits, self.labels)

    @cached_property
    def margin(self) -> Tensor:
        """`[n]`, by how much the label's logit exceeds that of the best other token; large for one token alone."""
        return margin_of(self.logits, self.labels)

    @cached_property
    def collision(self) -> Tensor:
        """`[n]`, Σ_v p_v², the probability that two draws from the policy agree."""
        return torch.linalg.vecdot(self.probs, self.probs)

    @cached_property
    def largest_prob(self) -> Tensor:
        """`[n]`, the policy's largest probability."""
        return self.log_probs.amax(-1).exp()

    @cached_property
    def prior_mass_below(self) -> Tensor:
        """`[n]`, Σ_v π_prior(v) over the tokens that the prior finds less probable than the label."""
        odds = odds_below(self.prior_logits, self.labels)
        return odds * self.prior_label_log_probs.exp()

    def top_k_entropy(self, k: int) -> Tensor:
        """`[n]`, entropy of the `k` most probable tokens, renormalised among themselves, divided by `ln k`.

        Zero in a vocabulary of one token, where nothing is undecided.
        """
        k = min(k, self.log_probs.size(-1))
        return entropy_of(top_values(self.log_probs, k)) / math.log(max(k, 2))

    @property
    def sequence_mean(self) -> NoReturn:
        """No mean over sequences here: a tile has some tokens of a document, and they would be taken for all."""
        raise ValueError(
            "`sequence_mean` is not known to a tile, which holds only some tokens of a document: register the trust "
            "with `per_sequence=True`, and it gets the `LabelStatistics` of the whole batch."
        )
