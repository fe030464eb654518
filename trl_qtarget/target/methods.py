"""The published objectives, one row each, and the target that a row makes of a tile of tokens.

`METHODS` reads like the unifying table of arXiv 2606.11189: a trust, a residual, a scale, the knobs with their
defaults, and where the prior comes from. All of the gradient is in these columns,

    gradient with respect to the logits  =  s · (p - Q),      Q = γ δ(y) + π̃⁺ - γ π̃⁻   (π̃⁺ = π̃⁻ except in `gem`).

`value` is the number that the publication calls its loss. It has the same gradient wherever it is differentiable, but
its height says nothing about another method's height.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType

import torch
from torch import Tensor

from .registry import Design, Knob, NonNegative, read_knobs
from .residual import RESIDUALS
from .tile import SMALLEST_SHARE, LabelStatistics, Measure, Tile, power_of
from .trust import TRUSTS


@dataclass
class TokenTarget:
    """The target Q for the `n` tokens of a tile, in parts, with its per-token statistics (all `[n]`)."""

    tile: Tile
    trust: Tensor
    scale: Tensor
    positive: Measure
    negative: Measure
    # Whether the residual has named the two by themselves, as in `gem`, even if with its knobs they are equal.
    two_sided: bool = False

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the labels, in nats."""
        return -self.tile.label_log_probs

    @property
    def is_mixture(self) -> bool:
        """Whether Q is a mixture of the label and one residual, as in every method but `gem` (there, for beta = 1)."""
        return self.positive is self.negative

    @cached_property
    def label_mass(self) -> Tensor:
        """Q(y): probability that the target puts on the label."""
        return self.trust + self.positive.label_probs - self.trust * self.negative.label_probs

    @cached_property
    def kl(self) -> Tensor:
        """KL(Q‖p) in nats; NaN where Q has negative entries, as in `gem` or for γ > 1."""
        if not self.is_mixture:
            return torch.full_like(self.trust, math.nan)
        rest, residual = 1 - self.trust, self.positive
        label_residual = residual.label_probs
        negative_entropy = (
            torch.xlogy(self.label_mass, self.label_mass)
            + torch.xlogy(rest, rest) * (1 - label_residual)
            - rest * (residual.entropy + torch.xlogy(label_residual, label_residual))
        )
        cross_entropy = self.trust * self.nll + rest * residual.cross_entropy
        return torch.where((rest >= 0) & (rest <= 1), negative_entropy + cross_entropy, math.nan)

    def gradient(self) -> tuple[list[tuple[Measure, Tensor]], Tensor]:
        """`s (p - Q)` as coefficients `[n]` of measures, each measure once, and the coefficient `[n]` of the label.

        Measures that are the same are added up: a policy residual leaves `s γ (p - δ)`, one pass over the vocabulary.
        """
        coefficients: dict[int, tuple[Measure, int, int]] = {}  # constant + factor · γ
        for measure, constant, factor in ((self.tile.policy, 1, 0), (self.positive, -1, 0), (self.negative, 0, 1)):
            _, old_constant, old_factor = coefficients.get(id(measure), (measure, 0, 0))
            coefficients[id(measure)] = (measure, old_constant + constant, old_factor + factor)
        terms = [
            (measure, self.scale * (constant + factor * self.trust))
            for measure, constant, factor in coefficients.values()
            if constant or factor
        ]
        return terms, -self.scale * self.trust


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
    """s · CE(Q, p), without the part CE(sg[p], p) of a residual π̃⁺ that is the policy, whose gradient is zero."""
    positive = 0.0 if target.positive is target.tile.policy else target.positive.cross_entropy
    label = target.trust * target.nll
    if target.two_sided:
        # CE(π̃⁻, p) is a term of the publication's own, also where π̃⁻ is the policy: `gem` does not jump at beta = 1.
        return target.scale * (label + positive - target.trust * target.negative.cross_entropy)
    return target.scale * (label + (1 - target.trust) * positive)


def divergence(target: TokenTarget) -> Tensor:
    """s · (γ NLL + (1 - γ) KL(π̃‖p))."""
    kl = target.positive.cross_entropy - target.positive.entropy
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


# --- the table ---


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published objective: names of its trust and residual, scale, loss value, knobs, prior and source."""

    trust: str
    residual: str = "policy"
    scale: Callable[..., Tensor] = unit_scale
    value: Callable[..., Tensor] = cross_entropy
    knobs: dict[str, float] = field(default_factory=dict)
    prior: str | None = None
    prior_sync_steps: int | None = None
    loss: str
    source: str
    arxiv: str | None = None


METHODS = MappingProxyType(
    {
        "sft": Method(trust="one", loss="-log p_y", source="supervised fine-tuning (NLL)"),
        "dft": Method(trust="probability", loss="-sg[p_y] log p_y", source="Dynamic Fine-Tuning", arxiv="2508.05629"),
        "beyond_log": Method(
            trust="power",
            knobs={"alpha": 1.0},
            value=power_loss,
            loss="(1 - p_y^alpha)/alpha",
            source="Beyond Log Likelihood",
            arxiv="2510.00526",
        ),
        "profit": Method(
            trust="threshold",
            knobs={"tau": 0.1},
            loss="-1[p_y > tau] log p_y",
            source="ProFit",
            arxiv="2601.09195",
        ),
        "eaft": Method(
            trust="entropy",
            knobs={"top_k": 20, "alpha": 1.0},
            loss="-sg[H_topk/ln k]^alpha log p_y",
            source="Entropy-Adaptive Fine-Tuning",
            arxiv="2601.02151",
        ),
        "iw_sft": Method(
            trust="importance",
            knobs={"temperature": 1.0, "clip_max": 16.0},
            prior="base",
            loss="-sg[w] log p_y, w = clip(exp(temperature · mean_t log(π_θ/π_prior)), 0, clip_max)",
            source="Importance-weighted SFT",
            arxiv="2507.12856",
        ),
        "cft": Method(
            trust="token_weights", loss="-c_t log p_y", source="Critical-token fine-tuning", arxiv="2510.10974"
        ),
        "label_smoothing": Method(
            trust="constant",
            residual="uniform",
            knobs={"lam": 0.1},
            loss="CE((1 - lam) δ + lam/V, p)",
            source="Label smoothing",
            arxiv="1512.00567",
        ),
        "sft_kl": Method(
            trust="anchor",
            residual="prior",
            scale=anchor_scale,
            value=divergence,
            knobs={"lam": 0.1},
            prior="base",
            loss="-log p_y + lam KL(π_prior‖p)",
            source="SFT with a KL anchor, as studied in RL's Razor",
            arxiv="2509.04259",
        ),
        "asft": Method(
            trust="probability_anchor",
            residual="prior",
            scale=probability_anchor_scale,
            value=divergence,
            knobs={"lam": 0.05},
            prior="base",
            loss="-sg[p_y] log p_y + lam KL(π_prior‖p)",
            source="Anchored SFT",
            arxiv="2509.23753",
        ),
        "psft": Method(
            trust="clipped_ratio",
            value=clipped_ratio_loss,
            knobs={"epsilon": 0.28},
            prior="lagged",
            prior_sync_steps=8,
            loss="-min(r, 1 + epsilon), r = p_y/π_prior(y)",
            source="Proximal SFT",
            arxiv="2508.17784",
        ),
        "gem": Method(
            trust="one",
            residual="sharpened",
            knobs={"beta": 0.7},
            loss="CE(δ, p) - CE(sg[softmax(z/beta)], p)",
            source="GEM",
            arxiv="2408.16673",
        ),
        "distill": Method(
            trust="zero",
            residual="prior",
            knobs={"temperature": 1.0},
            prior="model",
            loss="CE(π_prior, p)",
            source="Knowledge distillation",
            arxiv="1503.02531",
        ),
        "distill_hybrid": Method(
            trust="constant",
            residual="prior",
            value=divergence,
            knobs={"lam": 0.5, "temperature": 1.0},
            prior="model",
            loss="-(1 - lam) log p_y + lam KL(π_prior‖p)",
            source="Knowledge distillation with labels",
            arxiv="1503.02531",
        ),
        "target_sft": Method(
            trust="probability",
            residual="guided",
            knobs={"eta": 0.5},
            prior="auto",
            loss="CE(Q, p), Q = p_y δ + (1 - p_y) π̃, π̃ ∝ p^(1-eta) π_prior^eta",
            source="Target-SFT (the paper's eta is not public; 0.5 is our choice)",
            arxiv="2606.11189",
        ),
    }
)


def find_method(name: str) -> Method:
    """The row of a published objective.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"`method={name!r}` is unknown. Known methods: {', '.join(METHODS)}. For a free combination set "
            "`method=None` with `trust=...` and `residual=...`."
        )
    return METHODS[name]


def _check_shape(kind: str, design: Design, result: Tensor, like: Tensor) -> None:
    # Only a user's own design can fail this; without it, broadcasting would train toward something else in silence.
    if result.shape != like.shape:
        raise ValueError(
            f"`{kind}={design.name!r}` returned shape {list(result.shape)}, not {list(like.shape)}: "
            "a trust returns one number per token, a residual one log-probability per token and vocabulary entry."
        )


@dataclass(frozen=True)
class Objective:
    """A method or free combination with every knob set: what the dense and the fused loss both evaluate."""

    trust: Design
    residual: Design
    scale: Callable[[Tile], Tensor]
    value: Callable[[TokenTarget], Tensor]
    knobs: dict[str, float]
    prior_is_policy: bool

    @property
    def uses_prior(self) -> bool:
        """Whether the logits of another distribution than the policy's own are needed."""
        return not self.prior_is_policy and (self.trust.uses_prior or self.residual.uses_prior)

    def token_trust(self, tile: Tile | LabelStatistics) -> Tensor:
        """γ of the tokens of a tile, or of all tokens for a per-sequence trust."""
        trust = self.trust(tile, self.knobs).to(tile.label_log_probs.dtype)
        _check_shape("trust", self.trust, trust, tile.label_log_probs)
        return trust

    def target(self, tile: Tile, trust: Tensor | None = None) -> TokenTarget:
        """The target for a tile; `trust[n]` is given for a per-sequence trust, which was computed beforehand."""
        found = self.residual(tile, self.knobs)
        two_sided = isinstance(found, tuple)
        first, second = found if two_sided else (found, found)
        positive = self._measure(tile, first)
        negative = positive if second is first else self._measure(tile, second)
        if trust is None:
            trust = self.token_trust(tile)
        return TokenTarget(tile, trust, self.scale(tile), positive, negative, two_sided)

    def _measure(self, tile: Tile, residual: Measure | Tensor) -> Measure:
        if isinstance(residual, Measure):
            return residual
        _check_shape("residual", self.residual, residual, tile.log_probs)
        return tile.policy if residual is tile.log_probs else tile.measure(residual)


def knobs_of(method: Method | None, trust: Design, residual: Design) -> dict[str, Knob]:
    """The knobs of a method (only those of its row) or of a free combination (all of its two designs).

    A knob that two designs share has one value, which has to suit both; the trust's default comes first.
    """
    declared: dict[str, Knob] = {}
    functions = [trust.function, residual.function] + ([method.scale, method.value] if method else [])
    for function in functions:
        for name, knob in read_knobs(function).items():
            first = declared.setdefault(name, knob)
            allowed = first.range & knob.range
            defaults = [default for default in (first.default, knob.default) if default in allowed]
            declared[name] = Knob(defaults[0] if defaults else first.default, allowed)
    if method is None:
        return declared
    return {name: Knob(default, declared[name].range) for name, default in method.knobs.items()}


def designs_of(method: Method | None, trust: str | None, residual: str | None) -> tuple[Design, Design]:
    """Trust and residual of a method, or of a free combination by name."""
    return TRUSTS.find(method.trust if method else trust), RESIDUALS.find(method.residual if method else residual)


def make_objective(
    method: Method | None, trust: Design, residual: Design, knobs: dict[str, float], prior_is_policy: bool
) -> Objective:
    """Bind a row or a free combination to its knobs.

    A residual that equals the policy with these settings (guided with eta = 0, or guided by the policy itself) becomes
    the residual `policy`: the same gradient, without a second model's logits.
    """
    if residual.is_policy(knobs, prior_is_policy):
        residual = RESIDUALS["policy"]

    def bind(function: Callable) -> Callable:
        return partial(function, **{name: knobs[name] for name in read_knobs(function) if name in knobs})

    return Objective(
        trust=trust,
        residual=residual,
        scale=bind(method.scale if method else unit_scale),
        value=bind(method.value if method else cross_entropy),
        knobs=knobs,
        prior_is_policy=prior_is_policy,
    )
