"""Scales `s`, and the numbers that publications call their loss: functions of a tile and of a target, `[n]` each.

A value has the gradient `s (p - Q)` wherever it is differentiable, but its height says nothing about another method's.
"""

import torch
from torch import Tensor

from .registry import NonNegative
from .tile import Tile
from .token_target import TokenTarget


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
    """s · CE(Q, p), without the mass that the target leaves with the policy: CE(sg[p], p) has no gradient."""
    value = target.trust * target.nll
    for part in target.parts:
        # What is taken away, as in `gem`, stays in the value, also where it is taken from the policy (beta = 1).
        if part.measure is not target.tile.policy or not part.constant:
            value = value + target.share(part) * part.measure.cross_entropy
    return target.scale * value


def divergence(target: TokenTarget) -> Tensor:
    """s · (γ NLL + (1 - γ) KL(π̃‖p))."""
    kl = target.residual.cross_entropy - target.residual.entropy
    return target.scale * (target.trust * target.nll + (1 - target.trust) * kl)


def power_loss(target: TokenTarget, *, alpha: NonNegative = 1.0) -> Tensor:
    """(1 - p_y^alpha)/alpha, which tends to the NLL as alpha goes to 0."""
    if alpha == 0:
        return target.nll
    return -torch.expm1(alpha * target.tile.label_log_probs) / alpha


def clipped_ratio_loss(target: TokenTarget, *, epsilon: NonNegative = 0.28) -> Tensor:
    """-min(r, 1 + epsilon), r = p_y/π_prior(y). (The lower clip of PPO never acts on a positive advantage.)"""
    ratio = (target.tile.label_log_probs - target.tile.prior_label_log_probs).exp()
    return -ratio.clamp(max=1 + epsilon)
