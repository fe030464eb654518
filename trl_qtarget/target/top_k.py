"""A prior of which only the k most probable tokens are known, the label's own probability, and the mass of the rest.

The rest is shaped by a rule. `tail="policy"`: as the policy shapes it, t_v = t_o · p_v/p_o for all v that are not
among the k, with t_o the prior's mass of the rest and p_o the policy's. What is learnt then is what is known, and no
more: a cross-entropy to such a prior has the gradient of the divergence over k + 1 events. `tail="uniform"`:
t_o/(V - k).

This is the specification, as log-probabilities `[n, V]`; `split.py` has the policy's tail without such a tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .tile import finite, floor_of, log_softmax_


TAILS = ("policy", "uniform")


@dataclass(frozen=True)
class TopKPrior:
    """The prior of `N` tokens by its `K` most probable ones. Logarithms are in nats; `-inf` is a probability of zero.

    Attributes:
        ids: `[N, K]`, the tokens, each once in a row.
        log_probs: `[N, K]`, their log-probabilities.
        label_log_probs: `[N]`, log-probability of the label, which need not be among the `K`.
        rest_log_mass: `[N]`, log-probability of all other tokens together: a log-sum of its own, for `1 - Σ` has no
            meaning in float32.
        tail: how these others share it: `"policy"`, as the policy would, or `"uniform"`.
        silent: `[N]`, bool: nothing is known there, whatever else stands there, and the policy is its own prior. None:
            nowhere.
    """

    ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor
    rest_log_mass: Tensor
    tail: str = "policy"
    silent: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "TopKPrior":
        """The same with a function applied to every tensor."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, **{name: function(value) for name, value in tensors.items()})

    def __getitem__(self, rows: slice | Tensor) -> "TopKPrior":
        return self.map(lambda value: value[rows])

    def like(self, values: Tensor) -> "TopKPrior":
        """The same on the device of some values, with finite numbers of their dtype."""
        moved = self.map(lambda value: value.detach().to(values.device))
        numbers = {
            name: finite(getattr(moved, name).to(values.dtype))
            for name in ("log_probs", "label_log_probs", "rest_log_mass")
        }
        return replace(moved, ids=moved.ids.long(), **numbers)

    def events(self, has_tail: Tensor) -> Tensor:
        """Log-probabilities `[n, K + 1]` of the tokens and of the rest, normalised.

        Where `has_tail[n]` is false, nothing can take the mass of the rest, and the prior is conditioned on the tokens
        that are known.
        """
        rest = torch.where(has_tail, self.rest_log_mass, floor_of(self.log_probs.dtype))
        return finite(log_softmax_(torch.cat([self.log_probs, rest[:, None]], dim=1)), in_place=True)

    def dense(self, scores: Tensor) -> Tensor:
        """Log-probabilities `[n, V]`; `scores[n, V]` are the policy's logits or log-probabilities."""
        floor, (size, vocabulary) = floor_of(scores.dtype), (self.ids.size(1), scores.size(-1))
        if self.tail == "policy":
            others = finite(scores.scatter(1, self.ids, floor), in_place=True)
            has_tail = others.amax(-1) > floor
            shape = log_softmax_(others)
        else:
            shape = torch.full_like(scores, -math.log(max(1, vocabulary - size)))
            has_tail = torch.full_like(self.rest_log_mass, size < vocabulary, dtype=torch.bool)
        events = self.events(has_tail)
        known = finite(shape.add_(events[:, -1:]).scatter_(1, self.ids, events[:, :-1]), in_place=True)
        return known if self.silent is None else self.or_policy(known, log_softmax_(scores.clone()))

    def or_policy(self, known: Tensor, policy: Tensor) -> Tensor:
        """`known[n, ...]`, and where nothing is known what the policy has in its place."""
        if self.silent is None:
            return known
        return torch.where(self.silent.view(-1, *[1] * (known.dim() - 1)), policy, known)

    def is_top1(self, labels: Tensor, policy: Tensor) -> Tensor:
        """Whether the label is the most probable token, `[n]`; among equals the first one is.

        `policy[n]` says the same of the policy.
        """
        top = self.log_probs.amax(-1, keepdim=True)
        first = torch.where(self.log_probs == top, self.ids, torch.iinfo(self.ids.dtype).max).amin(-1)
        return self.or_policy(first == labels, policy)


def check_top_k(prior: TopKPrior, rows: int, vocabulary: int) -> None:
    """Raise unless a prior speaks of `rows` tokens of this vocabulary."""
    if prior.tail not in TAILS:
        raise ValueError(f"`prior_top_k.tail={prior.tail!r}` is unknown: choose one of {', '.join(TAILS)}.")
    ids = prior.ids
    if ids.dim() != 2 or ids.size(0) != rows or not 1 <= ids.size(1) <= vocabulary:
        raise ValueError(
            f"`prior_top_k.ids` must be [{rows}, K], one row per token with K from 1 to the vocabulary's "
            f"{vocabulary}, got {list(ids.shape)}."
        )
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"`prior_top_k.ids` must be token ids, got dtype {ids.dtype}: convert it to torch.long.")
    for name, shape in (
        ("log_probs", ids.shape),
        ("label_log_probs", ids.shape[:1]),
        ("rest_log_mass", ids.shape[:1]),
    ):
        value = getattr(prior, name)
        if value.shape != shape:
            raise ValueError(f"`prior_top_k.{name}` must have shape {list(shape)}, got {list(value.shape)}.")
        if not value.is_floating_point() or (value > 1e-3).any():
            raise ValueError(f"`prior_top_k.{name}` must hold log-probabilities, floats of at most 0.")
    silent = prior.silent
    if silent is not None and (silent.shape != ids.shape[:1] or silent.dtype != torch.bool):
        raise ValueError(f"`prior_top_k.silent` must be bool of shape {list(ids.shape[:1])}.")
    ordered = ids.long().sort(dim=1).values
    if rows and (ordered[:, 0].min() < 0 or ordered[:, -1].max() >= vocabulary):
        raise ValueError(f"`prior_top_k.ids` holds an id outside the vocabulary of {vocabulary}.")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("`prior_top_k.ids` names a token twice in a row: give each of the k tokens once.")
