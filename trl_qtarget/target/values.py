"""Scales `s`, and the numbers that publications call their loss: functions of a tile and of a target, `[n]` each.

A value has the gradient `s (p - Q)` wherever it is differentiable, but its height says nothing about another method's.
"""

import torch
from torch import Tensor

from .registry import NonNegative, Positive
from .tile import SMALLEST_SHARE, Tile, power_of
from .token_target import TokenTarget
from .trust import IDFT_FLOOR, adaptive_weight


# --- scale: s, one number per token ---


def unit_scale(tile: Tile) -> Tensor:
    """s = 1."""
    return torch.ones_like(tile.label_log_probs)


def anchor_scale(tile: Tile, *, lam: NonNegative = 0.1) -> Tensor:
    """s = 1 + lam."""
    return torch.full_like(tile.label_log_probs, 1 + lam)


def probability_anchor_scale(tile: Tile, *, lam: NonNegative = 0.05) -> Tensor:
    """s = p_y + lam."""
    return tile.label_probs + lam


# --- value: the published loss of a token ---


def cross_entropy(target: TokenTarget) -> Tensor:
    """s · CE(Q, p), without what the first part leaves with the policy: CE(sg[p], p) has no gradient."""
    value = target.trust * target.nll
    first, *others = target.parts
    for part in others if first.measure is target.tile.policy else target.parts:
        value = value + target.share(part) * part.measure.cross_entropy
    return target.scale * value


def divergence(target: TokenTarget) -> Tensor:
    """s · (γ NLL + (1 - γ) KL(π̃‖p))."""
    kl = target.residual.cross_entropy - target.residual.entropy
    return target.scale * (target.trust * target.nll + (1 - target.trust) * kl)


def power_loss(target: TokenTarget, *, alpha: NonNegative = 1.0) -> Tensor:
    """(1 - p_y^alpha)/alpha, which tends to the NLL as alpha goes to 0."""
    exponent = power_of(target.tile.label_log_probs, alpha)
    if alpha >= SMALLEST_SHARE:
        return -torch.expm1(exponent) / alpha
    # NLL · (exp(x) - 1)/x with x = alpha log p_y, of which the quotient is 1 where the dtype rounds x to zero.
    quotient = torch.where(exponent == 0, 1.0, torch.expm1(exponent) / exponent)
    return torch.where(exponent > -1, target.nll * quotient, -torch.expm1(exponent) / alpha)


def clipped_ratio_loss(target: TokenTarget, *, epsilon: NonNegative = 0.28) -> Tensor:
    """-min(r, 1 + epsilon), r = p_y/π_prior(y). (The lower clip of PPO never acts on a positive advantage.)"""
    ratio = (target.tile.label_log_probs - target.tile.prior_label_log_probs).exp()
    return -ratio.clamp(max=1 + epsilon)


def collision_loss(target: TokenTarget) -> Tensor:
    """(1 - p_y^c)/c, c = sg[Σ_v p_v²]."""
    collision = target.tile.collision
    return -torch.expm1(collision * target.tile.label_log_probs) / collision


def tempered_label_loss(target: TokenTarget, *, beta: Positive = 0.8) -> Tensor:
    """-γ beta log softmax(z/beta)_y."""
    return -target.trust * beta * target.parts[-1].measure.label_log_probs


def spared_divergence(target: TokenTarget) -> Tensor:
    """γ NLL + lam KL(π̄‖p̄), prior and policy without the label, over all or some of the other tokens."""
    _, prior, policy = target.parts
    return target.trust * target.nll + prior.constant * prior.measure.divergence_from(policy.measure)


def spared_cross_entropy(target: TokenTarget) -> Tensor:
    """γ NLL + lam CE(π̄, p̄), prior and policy without the label, over some of the other tokens."""
    _, prior, policy = target.parts
    value = -torch.linalg.vecdot(prior.measure.probs, policy.measure.log_probs)
    return target.trust * target.nll + prior.constant * value


def ratio_anchor_loss(target: TokenTarget, *, lam: NonNegative = 0.05) -> Tensor:
    """-sg[p_y] log p_y + lam (ρ - 1 - log ρ), ρ = π_prior(y)/p_y, |log ρ| at most 10."""
    tile = target.tile
    log_ratio = (tile.prior_label_log_probs - tile.label_log_probs).clamp(-10, 10)
    return tile.label_probs * target.nll + lam * (torch.expm1(log_ratio) - log_ratio)


def adaptive_power_loss(target: TokenTarget, *, beta: Positive = 1.0) -> Tensor:
    """-sg[p^e] log p with the exponent of `adaptive_power`, p = max(p_y, 1e-10)."""
    return adaptive_weight(target.tile, beta) * target.nll.clamp(max=-IDFT_FLOOR)
