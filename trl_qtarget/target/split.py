"""Targets of a top-k prior whose tail is the policy's: one coefficient of p for every token, and k corrections.

Outside of the k tokens that are known of the prior, the policy, the prior and every product p^a · t^(1-a) of both have
one shape: the policy's own. So a distribution is k + 1 numbers, the log-probabilities of the k tokens and of the rest,
and mixtures, entropies and divergences are those of k + 1 events. Nothing of the prior has the vocabulary's size.

The policy's log-mass of the rest is the log-sum of a softmax that leaves the k tokens out; with them left out, that
softmax is the shape.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from .embeddings import Embeddings
from .measured import AUTO
from .objective import Objective
from .tile import Measure, Tile, floor_of, log_softmax_, mixed
from .token_target import parts_of
from .top_k import TopKPrior


class SplitMeasure(Measure):
    """A distribution by `events[n, k + 1]`: log-probabilities of k tokens, and of the rest, shaped as in the tile."""

    def __init__(self, tile: "SplitTile", events: Tensor):
        self.tile, self.events, self.labels = tile, events, tile.labels

    @property
    def policy_log_probs(self) -> Tensor:
        return self.tile.log_probs

    @cached_property
    def log_probs(self) -> Tensor:
        return self.tile.spread(self.events)

    @cached_property
    def label_log_probs(self) -> Tensor:
        return self.tile.of_label(self.events)

    @cached_property
    def entropy(self) -> Tensor:
        return self._mean(-self.events) + self.events[:, -1].exp() * self.tile.tail_entropy

    @cached_property
    def cross_entropy(self) -> Tensor:
        return self._mean(-self.tile.policy.events) + self.events[:, -1].exp() * self.tile.tail_entropy

    def divergence_from(self, other: Measure) -> Tensor:
        if not isinstance(other, SplitMeasure):
            return super().divergence_from(other)
        return self._mean(self.events - other.events)

    def _mean(self, values: Tensor) -> Tensor:
        return torch.linalg.vecdot(self.events.exp(), values)


class SplitTile(Tile):
    """A tile that knows its policy as k tokens and the rest, beside a top-k prior.

    Args:
        tail: a tile of the same tokens, of logits `[n, V]` that have `floor_of` at the k tokens.
        tail_log_sum: `[n]`, log-sum of these logits.
        known_logits: `[n, k]`, the policy's logits of the k tokens.
        label_logits: `[n]`, those of the labels.
        prior: what is known of the prior.
        is_top1: `[n]`, whether the label is the policy's most probable token.
    """

    def __init__(
        self,
        tail: Tile,
        tail_log_sum: Tensor,
        known_logits: Tensor,
        label_logits: Tensor,
        prior: TopKPrior,
        is_top1: Tensor,
    ):
        self.tail, self.prior, self.labels = tail, prior, tail.labels
        self.token_weights, self.output_embeddings = tail.token_weights, tail.output_embeddings
        self.reuse_buffers = False
        self.known_logits, self.label_logits, self._is_top1 = known_logits, label_logits, is_top1
        floor = floor_of(known_logits.dtype)
        events = torch.cat([known_logits, tail_log_sum[:, None]], dim=1).clamp_(min=floor)
        self._has_tail = events[:, -1] > floor
        self._policy_events = torch.clamp(log_softmax_(events), min=floor)
        among = prior.ids == self.labels[:, None]
        # The label's place among the k + 1 events, and its logarithm within the rest; 0 where it is one of the k.
        self.place = torch.where(among.any(1), among.long().argmax(1), prior.ids.size(1))
        self.label_in_tail = torch.where(among.any(1), 0.0, (label_logits - tail_log_sum).clamp(min=floor))

    def of_label(self, events: Tensor) -> Tensor:
        """`[n]`, log-probability of the label under `events[n, k + 1]`."""
        known = events.gather(1, self.place[:, None]).squeeze(1) + self.label_in_tail
        return known.clamp(min=floor_of(events.dtype))

    def spread(self, events: Tensor) -> Tensor:
        """Log-probabilities `[n, V]`, a new tensor."""
        spread = self.tail.log_probs + events[:, -1:]
        return spread.scatter_(1, self.prior.ids, events[:, :-1]).clamp_(min=floor_of(events.dtype))

    @cached_property
    def tail_entropy(self) -> Tensor:
        """`[n]`, entropy of the policy among the tokens of the tail; 0 where it has none there."""
        return torch.where(self._has_tail, self.tail.policy.entropy, 0.0)

    @cached_property
    def policy(self) -> SplitMeasure:
        return SplitMeasure(self, self._policy_events)

    @cached_property
    def log_probs(self) -> Tensor:
        return self.policy.log_probs

    @property
    def logits(self) -> Tensor:
        return self.log_probs

    @cached_property
    def label_log_probs(self) -> Tensor:
        return self.policy.label_log_probs

    @cached_property
    def prior_label_log_probs(self) -> Tensor:
        return self.prior.or_policy(self.prior.label_log_probs, self.label_log_probs)

    @cached_property
    def prior_events(self) -> Tensor:
        """`[n, k + 1]`, the prior's log-probabilities of the k tokens and of the rest."""
        return self.prior.or_policy(self.prior.events(self._has_tail), self._policy_events)

    @cached_property
    def prior_logits(self) -> Tensor:
        """`[n, V]`, for who wants to look at it; a design that reads it is refused (`plan_of`)."""
        return self.prior.dense(self.log_probs)

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        if (policy, prior) == (1.0, 0.0):
            return self.policy
        if prior > 0 and is_normalised(policy, prior):
            return SplitMeasure(self, mixed(self.policy.events, self.prior_events, policy, prior))
        if prior == 0:
            return self.measure(mixed(self.log_probs, None, policy, prior))
        return super().mixture(policy, prior)

    @cached_property
    def collision(self) -> Tensor:
        of_tail = torch.where(self._has_tail, self.tail.collision, 0.0)
        known = self.policy.events.mul(2).exp()
        return known[:, :-1].sum(1) + known[:, -1] * of_tail

    @property
    def is_top1(self) -> Tensor:
        return self._is_top1

    @property
    def prior_is_top1(self) -> Tensor:
        return self.prior.is_top1(self.labels, self._is_top1)


def is_normalised(policy: float, prior: float) -> bool:
    """Whether p^policy · t^prior keeps the shape of a tail that p and t share."""
    return math.isclose(policy + prior, 1.0, abs_tol=1e-12)


# --- which objectives a top-k prior is enough for ---


class _WholePrior(Exception):
    """A design has asked for more of the prior than its k tokens say."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise _WholePrior


class _Hidden(SplitMeasure):
    """A mixture that may become a part of a target, and of which nothing may be read."""

    log_probs = probs = label_log_probs = entropy = cross_entropy = property(_refuse)


class _LabelAlone(SplitTile):
    """A tile that knows the label's prior probability, and refuses what else is asked of the prior."""

    prior_logits = prior_log_probs = prior_is_top1 = prior_mass_below = property(_refuse)

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        return super().mixture(policy, prior) if prior == 0 else _refuse()

    def spared(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        return super().spared(policy, prior) if prior == 0 else _refuse()


class _Split(_LabelAlone):
    """The same for a residual, which may also mix policy and prior in shares that add up to one."""

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        if prior > 0 and is_normalised(policy, prior):
            return _Hidden(self, self.policy.events)
        return super().mixture(policy, prior)


@dataclass(frozen=True)
class TopKPlan:
    """What an objective needs of a top-k prior.

    Attributes:
        label_alone: the label's probability, and nothing else.
        split: its residual is made of measures that k + 1 numbers describe.
    """

    label_alone: bool
    split: bool


def plan_of(objective: Objective) -> TopKPlan:
    """What an objective needs of a top-k prior: tried on two tokens, and remembered.

    Raises:
        ValueError: it needs more than such a prior knows: another temperature, or statistics of the whole prior.
    """
    # One that is yet to be measured may be any number: it says how much, and not what is asked of the prior.
    objective = replace(objective, knobs={name: 1.0 if it == AUTO else it for name, it in objective.knobs.items()})
    # Two objectives of the same functions and knobs may differ in their progress alone.
    key = tuple(design.function for design in objective.designs), tuple(sorted(objective.knobs.items()))
    if key not in _plans:
        _plans[key] = _plan_of(objective)
    return _plans[key]


_plans: dict[Any, TopKPlan] = {}


def _plan_of(objective: Objective) -> TopKPlan:
    for kind, design in objective.designs._asdict().items():
        if kind == "residual" or design.per_sequence:  # of the latter, what it gets has nothing but labels
            continue
        try:
            design(_tried(_LabelAlone, objective), objective.knobs)
        except _WholePrior:
            raise _not_enough(f"the {kind} {design.name!r}") from None
    if not objective.residual.uses_prior:
        return TopKPlan(label_alone=True, split=False)
    tile = _tried(_Split, objective)
    try:
        parts = parts_of(objective.residual(tile, objective.knobs))
    except _WholePrior:
        settings = {name: objective.knobs[name] for name in objective.residual.knobs if name in objective.knobs}
        with_knobs = "".join(f", {name}={value}" for name, value in settings.items())
        raise _not_enough(f"the residual {objective.residual.name!r}{with_knobs}") from None
    return TopKPlan(label_alone=False, split=all(isinstance(part.measure, SplitMeasure) for part in parts))


def _not_enough(what: str) -> ValueError:
    return ValueError(
        f"A prior of the k most probable tokens is not enough for {what}, which reads more of it: a top-k prior "
        "serves trusts and scales of the label's prior probability, and the residuals 'guided' and 'prior' at "
        "temperature 1. Use a cache of the form 'hidden', or the model itself."
    )


def _tried(kind: type[SplitTile], objective: Objective) -> SplitTile:
    """Two tokens over a vocabulary of six, for designs to be tried on."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 0.2, -0.3], [0.4, -0.2, 0.1, 0.9, -1.0, 0.3]], dtype=torch.float64)
    labels, floor = torch.tensor([1, 4]), floor_of(logits.dtype)
    ids, numbers = torch.tensor([[0, 1], [3, 2]]), torch.tensor([0.4, 0.2], dtype=torch.float64).log()
    prior = TopKPrior(ids, numbers.expand(2, 2), numbers, numbers)
    others = logits.scatter(1, ids, floor)
    weight = logits.T.contiguous()
    tail = Tile(
        log_softmax_(others.clone()),
        labels,
        token_weights=torch.ones(2, dtype=logits.dtype),
        output_embeddings=Embeddings(weight, labels),
    )
    known, of_label = logits.gather(1, ids), logits.gather(1, labels[:, None]).squeeze(1)
    tile = kind(tail, others.logsumexp(-1), known, of_label, prior, labels == 0)
    tile.progress = objective.progress
    return tile
