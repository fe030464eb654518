"""Residual: where the probability goes that the observed token does not get.

Each residual is a function from a tile of tokens to the log-probabilities of π̃ `[n, V]`, in the target
`Q = γ δ(y) + (1 - γ) π̃`. Its keyword-only parameters are its knobs.

Some published objectives take mass away from another distribution than the one they give mass to. A residual may
therefore return two measures, `(positive, negative)`, and then `Q = γ δ(y) + π̃⁺ - γ π̃⁻` (the unifying table of
arXiv 2606.11189 uses the same π̃⁺ and π̃⁻); or a list of parts, each a measure with a share that is affine in γ. The
first part is what an objective leaves with the policy, if it is the policy.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import AtLeastTwo, Count, NonNegative, Positive, Share, Shelf, Unit
from .tile import Measure, Tile, floor_of, tempered
from .token_target import Part


RESIDUALS = Shelf("residual", ("uses_prior", "uses_embeddings", "uses_token_weights", "is_policy"))


def register_residual(name: str, function: Callable | None = None, **properties: Any) -> Callable:
    """Add a residual design under `name`, for `QTargetConfig(method=None, trust=..., residual=name)`.

    Args:
        name: the name to use in configurations.
        function: `function(tile, *, knob=default, ...) -> log π̃ [n, V]`, log-probabilities that sum to one in every
            row; for a zero use `trl_qtarget.floor_of(dtype)`, not `-inf`. Or `tile.mixture(policy=a, prior=b)`,
            the distribution ∝ p^a · π_prior^b, which costs the least on a GPU. `tile` is a
            [`Tile`][trl_qtarget.Tile] of `n` scored tokens: `log_probs[n, V]`, `labels[n]`, `prior_logits[n, V]`
            if `uses_prior`, `embeddings[V, H]` and `nearest(k)` if `uses_embeddings`, `token_weights[n]` if
            `uses_token_weights`; do not write into them. Knobs as in [`register_trust`][trl_qtarget.register_trust].
            Without `function`, a decorator is returned.
        uses_prior: whether the function reads the prior.
        uses_embeddings: whether the function reads the output embeddings.
        uses_token_weights: whether the function reads the dataset's per-token weights.
        is_policy: `is_policy(knobs, prior_is_policy) -> bool`, whether with these knobs the result is the policy's own
            distribution; it is then not computed. Default: never.

    Returns:
        The function, or a decorator.

    Raises:
        ValueError: the name is taken, a keyword-only parameter is not a knob of `QTargetConfig`, or a property is not
            one of the above.

    Examples:
        >>> @register_residual("tempered")
        ... def tempered(tile, *, temperature: Positive = 2.0):
        ...     return tile.mixture(policy=1 / temperature)
    """
    return RESIDUALS.register(name, function, **properties)


@register_residual("policy", is_policy=lambda knobs, prior_is_policy: True)
def policy(tile: Tile) -> Measure:
    """π̃ = p, the policy itself: the target becomes a pure re-weighting of the NLL."""
    return tile.policy


@register_residual("uniform")
def uniform(tile: Tile) -> Measure:
    """π̃ = 1/V over the whole vocabulary, the label included."""
    return tile.mixture()


@register_residual(
    "prior",
    uses_prior=True,
    is_policy=lambda knobs, prior_is_policy: prior_is_policy and knobs.get("temperature", 1.0) == 1.0,
)
def prior(tile: Tile, *, temperature: Positive = 1.0) -> Measure:
    """π̃ = softmax(t/temperature), the prior's (a teacher's) distribution."""
    return tile.mixture(prior=1 / temperature)


@register_residual(
    "guided", uses_prior=True, is_policy=lambda knobs, prior_is_policy: prior_is_policy or knobs["eta"] == 0
)
def guided(tile: Tile, *, eta: Unit = 0.5) -> Measure:
    """π̃ ∝ p^(1-eta) · π_prior^eta: the policy, steered by the prior."""
    return tile.mixture(policy=1 - eta, prior=eta)


@register_residual("sharpened")
def sharpened(tile: Tile, *, beta: Positive = 0.7) -> tuple[Measure, Measure]:
    """π̃⁺ = p and π̃⁻ = softmax(z/beta): the label's gain is taken from the tokens the policy prefers."""
    return tile.policy, tile.mixture(policy=1 / beta)


@register_residual("neighbors", uses_embeddings=True)
def neighbors(tile: Tile, *, top_k: Count = 20, temperature: Positive = 1.0) -> Tensor:
    """π̃ = softmax(cosine/temperature) over the label's top_k nearest other tokens in the output embeddings."""
    if tile.log_probs.size(-1) == 1:
        return torch.zeros_like(tile.log_probs)  # the only distribution over one token
    cosines, tokens = tile.nearest(top_k)
    log_probs = torch.full_like(tile.log_probs, floor_of(tile.log_probs.dtype))
    return log_probs.scatter_(1, tokens, tempered(cosines, temperature))


@register_residual("flattened")
def flattened(tile: Tile, *, temperature: Positive = 1.3, beta: Share = -0.1) -> list[Part]:
    """Q = γ δ + (1 - beta - γ) p + beta q, q = softmax(z/temperature): wrong samples are rewarded by beta."""
    return [Part(tile.policy, 1.0 - beta, -1.0), Part(tile.mixture(policy=1 / temperature), beta, 0.0)]


@register_residual("spared_prior", uses_prior=True)
def spared_prior(tile: Tile, *, lam: NonNegative = 1.0) -> list[Part]:
    """Q = γ δ + (1 - γ) p + lam (π̄ - p̄), prior and policy without the label: an anchor that leaves the label alone."""
    return [
        Part(tile.policy, 1.0, -1.0),
        Part(tile.spared(prior=1.0), lam, 0.0),
        Part(tile.spared(policy=1.0), -lam, 0.0),
    ]


@register_residual("spared_top", uses_prior=True)
def spared_top(
    tile: Tile, *, lam: NonNegative = 1.0, top_k: AtLeastTwo = 10, temperature: Positive = 1.0
) -> list[Part]:
    """The same among the prior's top_k tokens without the label, at least two of them; the prior at `temperature`."""
    inside = _top_without_label(tile.prior_log_probs, tile.labels, top_k)
    floor = floor_of(tile.log_probs.dtype)
    prior = tempered(tile.prior_log_probs.masked_fill(~inside, floor), temperature)
    policy = tempered(tile.log_probs.masked_fill(~inside, floor), 1.0)
    share = lam if tile.log_probs.size(-1) > 2 else 0.0  # one other token: nothing to anchor among themselves
    return [
        Part(tile.policy, 1.0, -1.0),
        Part(tile.measure(prior), share, 0.0),
        Part(tile.measure(policy), -share, 0.0),
    ]


def _top_without_label(log_probs: Tensor, labels: Tensor, k: int) -> Tensor:
    """`[n, V]`, which tokens are among the k most probable; the label is put aside, two are left at least."""
    others = log_probs.scatter(1, labels[:, None], -math.inf)
    found = others.topk(min(k, max(1, log_probs.size(-1) - 1)), dim=-1)
    label = log_probs.gather(1, labels[:, None])
    label_is_among = ((others > label).sum(-1) < k).long()
    kept = torch.arange(found.indices.size(1), device=labels.device) < (k - label_is_among).clamp(min=2)[:, None]
    return torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, found.indices, kept)
