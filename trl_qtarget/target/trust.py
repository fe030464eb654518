"""Trust: how far to believe the observed token.

Each trust is a function from a tile of tokens to γ `[n]`, the weight of the observed token in the target
`Q = γ δ(y) + (1 - γ) π̃`. Its keyword-only parameters are its knobs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import AtLeastTwo, Exponent, MoreThanHalf, NonNegative, Positive, PositiveUnit, Share, Shelf, Unit
from .tile import LabelStatistics, Tile, power_of


TRUSTS = Shelf("trust", ("uses_prior", "per_sequence", "uses_token_weights", "statistics", "has_zeros"))


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
        statistics: which of `rank`, `margin`, `collision` and `prior_mass_below` the function reads of its tile, a
            tuple. One that is not named here may be read all the same, but takes longer and more memory on a GPU.
        has_zeros: whether γ is exactly zero for many tokens. Where the residual is the policy, such tokens are left
            out of the products with the head; a GPU looks for them only where this says so.

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
def power(tile: Tile, *, alpha: Exponent = 1.0) -> Tensor:
    """γ = p_y^alpha; `alpha="auto"` follows what the policy knows of the data before it is trained."""
    return power_of(tile.label_log_probs, alpha).exp()


@register_trust("threshold", has_zeros=True)
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


@register_trust("clipped_ratio", uses_prior=True, has_zeros=True)
def clipped_ratio(tile: Tile, *, epsilon: NonNegative = 0.28) -> Tensor:
    """γ = r·1[r < 1 + epsilon], r = p_y/π_prior(y): no push where the policy has already moved far enough.

    Where both probabilities are zero, as for a masked token, r = 1: the policy has not moved.
    """
    ratio = (tile.label_log_probs - tile.prior_label_log_probs).exp()
    return torch.where(ratio >= 1 + epsilon, 0.0, ratio)  # a ratio of NaN stays NaN


@register_trust("token_weights", uses_token_weights=True, has_zeros=True)
def token_weights(tile: Tile) -> Tensor:
    """γ = the dataset's weight of the token (a critical-token mask, or any non-negative number)."""
    return tile.token_weights


# --- of 2026 ---


@register_trust("informative", has_zeros=True)
def informative(tile: Tile, *, tau: MoreThanHalf = 0.93) -> Tensor:
    """γ = p_y max(0, 1 - logit(p_y)/logit(tau)): a bell that is zero from p_y = tau on."""
    log_odds = tile.label_log_probs - torch.log(-torch.expm1(tile.label_log_probs))
    return tile.label_probs * (1 - log_odds / math.log(tau / (1 - tau))).clamp(min=0)


@register_trust("tilt", uses_prior=True)
def tilt(tile: Tile, *, beta: Positive = 20.0) -> Tensor:
    """γ = r (e^beta - 1)/(1 + r (e^beta - 1)), r = π_prior(y): the prior with the label's logit raised by beta."""
    return torch.sigmoid(tile.prior_label_log_probs + beta + math.log1p(-math.exp(-beta)))


@register_trust("prior_probability", uses_prior=True)
def prior_probability(tile: Tile) -> Tensor:
    """γ = π_prior(y)."""
    return tile.prior_label_log_probs.exp()


@register_trust("prior_mass", uses_prior=True, statistics=("prior_mass_below",), has_zeros=True)
def prior_mass(tile: Tile, *, tau: Unit = 0.5) -> Tensor:
    """γ = 1 if the prior gives the label and all that it finds less probable at least tau, else 0."""
    mass = tile.prior_mass_below + tile.prior_label_log_probs.exp()
    return torch.where(mass < tau, 0.0, torch.where(mass.isnan(), mass, 1.0))  # NaN of a prior that is none stays NaN


@register_trust("collision_power", statistics=("collision",))
def collision_power(tile: Tile) -> Tensor:
    """γ = p_y^c, c = Σ_v p_v²: dft where the policy is sure, sft where it is not."""
    return (tile.collision * tile.label_log_probs).exp()


@register_trust("harmonic")
def harmonic(tile: Tile, *, lam: Unit = 0.5) -> Tensor:
    """γ = p_y/(lam + (1 - lam) p_y)."""
    denominator = lam + (1 - lam) * tile.label_probs
    return torch.where(denominator > 0, tile.label_probs / denominator, 1.0)  # lam = 0: 1, also where p_y underflowed


@register_trust("focal_slope")
def focal_slope(tile: Tile, *, alpha: NonNegative = 3.0) -> Tensor:
    """γ = (1 - p_y)^alpha - alpha p_y (1 - p_y)^(alpha - 1) log p_y: the slope of the focal loss."""
    rest = -torch.expm1(tile.label_log_probs)
    # -log p_y/(1 - p_y), which tends to 1 with p_y.
    steepness = torch.where(rest > 0, -tile.label_log_probs / rest, 1.0)
    return rest**alpha * (1 + alpha * tile.label_probs * steepness)


@register_trust("uncertainty")
def uncertainty(tile: Tile) -> Tensor:
    """γ = p_y (1 - p_y)."""
    return tile.label_probs * -torch.expm1(tile.label_log_probs)


@register_trust("relative_rank", statistics=("rank",))
def relative_rank(tile: Tile) -> Tensor:
    """γ = p_y (p_y E)^-K, E the rank to be expected at this entropy, K = 1/log2(1 + max(E, rank))²."""
    bits = tile.policy.entropy / math.log(2)
    expected = torch.where(bits >= 2, 0.25 * torch.exp2(bits) + 1, 2 - tile.largest_prob)
    power = torch.log2(torch.maximum(expected, tile.rank) + 1) ** -2
    return tile.label_probs * (tile.label_probs * expected).clamp(min=1e-6) ** -power


@register_trust("margin", statistics=("margin",), has_zeros=True)
def margin(tile: Tile, *, beta: NonNegative = 1.5, tau: Positive = 0.8) -> Tensor:
    """γ = exp(-(Δ - beta)²/(2 tau²)), Δ the label's logit minus the best other one."""
    return torch.exp(-(((tile.margin - beta) / tau) ** 2) / 2)


@register_trust("capped_probability")
def capped_probability(tile: Tile, *, tau: PositiveUnit = 0.1) -> Tensor:
    """γ = min(1, p_y/tau)."""
    return (tile.label_probs / tau).clamp(max=1)


@register_trust("adaptive_power")
def adaptive_power(tile: Tile, *, beta: Positive = 1.0) -> Tensor:
    """γ = p_y^e, e = 1 + λ (clip(exp(-(log p_y + H)/beta), 0.1, 2) - 1), λ from 0 to 1 between 20 and 30% of training.

    `log p_y + H` is how much more probable the label is than a draw from the policy, on average.
    """
    log_label = tile.label_log_probs
    return torch.where(log_label >= IDFT_FLOOR, adaptive_weight(tile, beta), 0.0)


# The publication's logarithm stops at p = 1e-10, and its gradient with it.
IDFT_FLOOR = math.log(1e-10)


def adaptive_weight(tile: Tile, beta: float) -> Tensor:
    """p_y^e with the exponent of `adaptive_power`, p_y no lower than the publication's logarithm goes."""
    begun = min(max((tile.progress - 0.2) / 0.1, 0.0), 1.0)
    log_label = tile.label_log_probs.clamp(min=IDFT_FLOOR)
    surprise = torch.exp(-(log_label + tile.policy.entropy) / beta).clamp(0.1, 2.0)
    return ((1 + begun * (surprise - 1)) * log_label).exp()


@register_trust("ratio_anchor", uses_prior=True)
def ratio_anchor(tile: Tile, *, lam: NonNegative = 0.05) -> Tensor:
    """γ = p_y + lam (r/p_y - 1), r = π_prior(y): dft and the k3 estimate of a KL, read from the label alone."""
    log_ratio = tile.prior_label_log_probs - tile.label_log_probs
    # Where the estimator's clamp of the log-ratio acts, its gradient is zero.
    return tile.label_probs + lam * torch.where(log_ratio.abs() > 10, 0.0, torch.expm1(log_ratio))


@register_trust("shifted_probability")
def shifted_probability(tile: Tile, *, lam: NonNegative = 0.05) -> Tensor:
    """γ = p_y - lam: dft and the k1 estimate of a KL, whose gradient knows nothing of the prior."""
    return tile.label_probs - lam


@register_trust("sampled")
def sampled(tile: Tile, *, temperature: Positive = 1.3, beta: Share = -0.1) -> Tensor:
    """γ = (1 - beta) q_y, q = softmax(z/temperature): the reward that tokens sampled from q get on average."""
    return (1 - beta) * tile.mixture(policy=1 / temperature).label_probs
