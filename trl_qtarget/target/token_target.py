"""Q for some tokens, in parts: the label, and measures whose shares are affine in the trust."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tile import Measure, Tile


class Part(NamedTuple):
    """One measure of a target, with the share `constant + factor · γ` of every token."""

    measure: Measure
    constant: float
    factor: float


def parts_of(residual: Any) -> tuple[Part, ...]:
    """The parts of what a residual returns: one measure π̃, a pair (π̃⁺, π̃⁻), or parts as they are."""
    if isinstance(residual, Sequence) and residual and isinstance(residual[0], Part):
        return tuple(residual)
    if isinstance(residual, tuple) and len(residual) == 2 and not isinstance(residual[0], float):
        positive, negative = residual
        return (Part(positive, 1.0, 0.0), Part(negative, 0.0, -1.0))
    return (Part(residual, 1.0, -1.0),)


@dataclass
class TokenTarget:
    """The target `Q = γ δ(y) + Σ_i (c_i + f_i γ) m_i` for the `n` tokens of a tile; its statistics are all `[n]`."""

    tile: Tile
    trust: Tensor
    scale: Tensor
    parts: tuple[Part, ...]

    def share(self, part: Part) -> Tensor:
        """`[n]`, what a measure has of Q."""
        return part.constant + part.factor * self.trust

    @property
    def residual(self) -> Measure | None:
        """π̃, where `Q = γ δ + (1 - γ) π̃` with one π̃, as in most methods (in `gem` for beta = 1); else None."""
        measures = {id(part.measure): part.measure for part in self.parts if part.constant or part.factor}
        shares = [sum(part.constant for part in self.parts), sum(part.factor for part in self.parts)]
        return next(iter(measures.values())) if len(measures) == 1 and shares == [1.0, -1.0] else None

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the labels, in nats."""
        return -self.tile.label_log_probs

    @cached_property
    def label_mass(self) -> Tensor:
        """Q(y): probability that the target puts on the label."""
        return self.trust + sum(self.share(part) * part.measure.label_probs for part in self.parts)

    @cached_property
    def kl(self) -> Tensor:
        """KL(Q‖p) in nats; NaN where Q has negative entries, as for γ > 1, or more parts than π̃, as in `gem`."""
        residual = self.residual
        if residual is None:
            return torch.full_like(self.trust, math.nan)
        rest, label_residual = 1 - self.trust, residual.label_probs
        negative_entropy = (
            torch.xlogy(self.label_mass, self.label_mass)
            + torch.xlogy(rest, rest) * (1 - label_residual)
            - rest * (residual.entropy + torch.xlogy(label_residual, label_residual))
        )
        cross_entropy = self.trust * self.nll + rest * residual.cross_entropy
        return torch.where((rest >= 0) & (self.label_mass >= 0), negative_entropy + cross_entropy, math.nan)

    def probs(self) -> Tensor:
        """Q `[n, V]`, a new tensor."""
        label, trust = self.tile.labels[:, None], self.trust[:, None]
        return sum(self.share(part)[:, None] * part.measure.probs for part in self.parts).scatter_add(1, label, trust)

    @cached_property
    def gradient(self) -> tuple[list[tuple[Measure, Tensor]], Tensor]:
        """`s (p - Q)` as coefficients `[n]` of measures, each measure once, and the coefficient `[n]` of the label.

        Measures that are the same are added up: a policy residual leaves `s γ (p - δ)`, one pass over the vocabulary.
        """
        coefficients: dict[int, tuple[Measure, float, float]] = {}
        gained = [Part(part.measure, -part.constant, -part.factor) for part in self.parts]
        for measure, constant, factor in (Part(self.tile.policy, 1.0, 0.0), *gained):
            _, old_constant, old_factor = coefficients.get(id(measure), (measure, 0.0, 0.0))
            coefficients[id(measure)] = (measure, old_constant + constant, old_factor + factor)
        terms = [
            (measure, self.scale * (constant + factor * self.trust))
            for measure, constant, factor in coefficients.values()
            if constant or factor
        ]
        return terms, -self.scale * self.trust

    def logits_gradient(self) -> Tensor:
        """`s (p - Q)` over the logits `[n, V]`, a new tensor."""
        terms, of_label = self.gradient
        (first, coefficient), *others = terms
        gradient = first.probs * coefficient[:, None]
        for measure, coefficient in others:
            gradient.addcmul_(measure.probs, coefficient[:, None])
        return gradient.scatter_add_(1, self.tile.labels[:, None], of_label[:, None])
