"""The published objectives, one row each, and the target that a row makes of a tile of tokens.

`METHODS` reads like the unifying table of arXiv 2606.11189: a trust, a residual, a scale, the knobs with their
defaults, and where the prior comes from. All of the gradient is in these columns,

    gradient with respect to the logits  =  s · (p - Q),      Q = γ δ(y) + π̃⁺ - γ π̃⁻   (π̃⁺ = π̃⁻ except in `gem`).

`value` is the number that the publication calls its loss. It has the same gradient wherever it is differentiable, but
its height says nothing about another method's height.
"""

from types import MappingProxyType

from .objective import Method
from .values import (
    anchor_scale,
    clipped_ratio_loss,
    divergence,
    power_loss,
    probability_anchor_scale,
)


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
