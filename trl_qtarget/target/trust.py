"""Trust: how far to believe the observed token.

Each trust is a function from a tile of tokens to γ `[n]`, the weight of the observed token in the target
`Q = γ δ(y) + (1 - γ) π̃`. Its keyword-only parameters are its knobs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import AtLeastTwo, NonNegative, Positive, Shelf, Unit
from .tile import LabelStatistics, Tile, power_of


TRUSTS = Shelf("trust", ("uses_prior", "per_sequence", "uses_token_weights"))


def register_trust(name: str, function: Callable | None = None, **properties: Any) -> Callable:
    """Add a trust design under `name`, for `QTargetConfig(method=None, trust=name, residual=...)`.

    Args:
        name: the name to use in configurations.
        function: `function(tile, *, knob=default, ...) -> γ [n]`. `tile` is a [`Tile`][trl_qtarget.Tile] of `n`
            scored tokens: `label_probs`, `label_log_probs`, `log_probs[n, V]`, `policy.entropy`, `token_weights`, and
            `prior_label_log_probs` if `uses_prior`. Knob names are fields of `QTargetConfig`; annotate them with a
            range from `trl_qtarget` (`Unit`, `Positive`, ...) to have them checked. Without `function`, a
            decorator is returned.
        uses_prior: whether the function reads the prior.
        per_sequence: whether γ needs all tokens of a document at once. The function then gets
            [`LabelStatistics`][trl_qtarget.LabelStatistics] of the whole batch instead of a tile, and the fused
            loss takes one extra pass over the logits.
        uses_token_weights: whether the function reads the dataset's per-token weights.

    Returns:
        The function, or a decorator.

    Raises:
        ValueError: the name is taken, a keyword-only parameter is not a knob of `QTargetConfig`, or a property is not
            one of the above.

    Examples:
        >>> @register_trust("root")
        ... def root(tile):
        ...     return tile.label_probs.sqrt()
    """
    return TRUSTS.register(name, function, **properties)


@register_trust("one")
def one(tile: Tile) -> Tensor:
    """γ = 1: the observed token is the truth."""
    return torch.ones_like(tile.label_log_probs)


@register_trust("zero")
def zero(tile: Tile) -> Tensor:
    """γ = 0: the observed token only says where the residual is evaluated."""
    return torch.zeros_like(tile.label_log_probs)


@register_trust("constant")
def constant(tile: Tile, *, lam: Unit = 0.1) -> Tensor:
    """γ = 1 - lam."""
    return torch.full_like(tile.label_log_probs, 1 - lam)


@register_trust("anchor")
def anchor(tile: Tile, *, lam: NonNegative = 0.1) -> Tensor:
    """γ = 1/(1 + lam): NLL plus lam times a KL to the residual, as one target."""
    return torch.full_like(tile.label_log_probs, 1 / (1 + lam))


@register_trust("probability")
def probability(tile: Tile) -> Tensor:
    """γ = p_y, the policy's own probability of the observed token."""
    return tile.label_probs


@register_trust("probability_anchor")
def probability_anchor(tile: Tile, *, lam: NonNegative = 0.05) -> Tensor:
    """γ = p_y/(p_y + lam): p_y-weighted NLL plus lam times a KL to the residual, as one target."""
    denominator = tile.label_probs + lam
    # lam = 0 and p_y underflowed: the limit of p_y/p_y is 1, and the scale p_y + lam makes the gradient 0 anyway.
    return torch.where(denominator > 0, tile.label_probs / denominator, 1.0)


@register_trust("power")
def power(tile: Tile, *, alpha: NonNegative = 1.0) -> Tensor:
    """γ = p_y^alpha."""
    return power_of(tile.label_log_probs, alpha).exp()


@register_trust("threshold")
def threshold(tile: Tile, *, tau: Unit = 0.1) -> Tensor:
    """γ = 1 if p_y > tau, else 0."""
    return (tile.label_probs > tau).to(tile.label_log_probs.dtype)


@register_trust("entropy")
def entropy(tile: Tile, *, top_k: AtLeastTwo = 20, alpha: NonNegative = 1.0) -> Tensor:
    """γ = (H_topk/ln k)^alpha: entropy of the top_k tokens, renormalised, so tokens already decided count little."""
    return tile.top_k_entropy(top_k).clamp(0, 1) ** alpha


@register_trust("importance", uses_prior=True, per_sequence=True)
def importance(labels: LabelStatistics, *, temperature: Positive = 1.0, clip_max: Positive = 16.0) -> Tensor:
    """γ = min(exp(temperature · mean_t(log π_θ - log π_prior)), clip_max), one per sequence."""
    log_ratio = labels.sequence_mean(labels.label_log_probs - labels.prior_label_log_probs)
    return (temperature * log_ratio).exp().clamp(max=clip_max)


@register_trust("clipped_ratio", uses_prior=True)
def clipped_ratio(tile: Tile, *, epsilon: NonNegative = 0.28) -> Tensor:
    """γ = r·1[r < 1 + epsilon], r = p_y/π_prior(y): no push where the policy has already moved far enough.

    Where both probabilities are zero, as for a masked token, r = 1: the policy has not moved.
    """
    ratio = (tile.label_log_probs - tile.prior_label_log_probs).exp()
    return torch.where(ratio >= 1 + epsilon, 0.0, ratio)  # a ratio of NaN stays NaN


@register_trust("token_weights", uses_token_weights=True)
def token_weights(tile: Tile) -> Tensor:
    """γ = the dataset's weight of the token (a critical-token mask, or any non-negative number)."""
    return tile.token_weights
