"""The published objectives, one row each, and the target that a row makes of a tile of tokens.

`METHODS` reads like the unifying table of arXiv 2606.11189: a trust, a residual, a scale, the knobs with their
defaults, and where the prior comes from. All of the gradient is in these columns,

    gradient with respect to the logits  =  s · (p - Q),      Q = γ δ(y) + π̃⁺ - γ π̃⁻   (π̃⁺ = π̃⁻ except in `gem`).

`value` is the number that the publication calls its loss. It has the same gradient wherever it is differentiable, but
its height says nothing about another method's height.
"""

from types import MappingProxyType

from .measured import AUTO
from .objective import Method
from .shown import nearest
from .values import (
    adaptive_power_loss,
    anchor_scale,
    clipped_ratio_loss,
    collision_loss,
    divergence,
    power_loss,
    probability_anchor_scale,
    ratio_anchor_loss,
    spared_cross_entropy,
    spared_divergence,
    tempered_label_loss,
)


# What the groups of methods do.
GROUPS = {
    "re-weighting": "how much each label counts; the rest of the mass stays with the policy",
    "prior-weighted": "the same, by what another distribution says of the label, per token or per sequence",
    "anchored": "the rest of the mass goes to the prior, or where prior and policy agree",
    "distilling": "the prior's whole distribution is taught, with or without the labels",
    "signed": "mass is taken from another distribution than it is given to",
}

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
            group="prior-weighted",
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
            group="anchored",
            trust="constant",
            residual="uniform",
            knobs={"lam": 0.1},
            loss="CE((1 - lam) δ + lam/V, p)",
            source="Label smoothing",
            arxiv="1512.00567",
        ),
        "sft_kl": Method(
            group="anchored",
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
            group="anchored",
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
        "asft_k3": Method(
            group="prior-weighted",
            trust="ratio_anchor",
            value=ratio_anchor_loss,
            knobs={"lam": 0.05},
            prior="base",
            loss="-sg[p_y] log p_y + lam (ρ - 1 - log ρ), ρ = π_prior(y)/p_y",
            source="Anchored SFT with the k3 estimate of the KL, as SkyRL has it",
            arxiv="2509.23753",
        ),
        "asft_k1": Method(
            trust="shifted_probability",
            knobs={"lam": 0.05},
            loss="-sg[p_y] log p_y + lam log p_y",
            source="Anchored SFT with the k1 estimate of the KL; its gradient does not see the prior",
            arxiv="2509.23753",
        ),
        "psft": Method(
            group="prior-weighted",
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
            group="signed",
            trust="one",
            residual="sharpened",
            knobs={"beta": 0.7},
            loss="CE(δ, p) - CE(sg[softmax(z/beta)], p)",
            source="GEM",
            arxiv="2408.16673",
        ),
        "infosft": Method(
            trust="informative",
            knobs={"tau": 0.93},
            loss="-sg[p_y max(0, 1 - logit(p_y)/logit(tau))] log p_y",
            source="InfoSFT",
            arxiv="2605.14967",
        ),
        "saft": Method(
            trust="harmonic",
            knobs={"lam": 0.5},
            loss="-sg[p_y/(lam + (1 - lam) p_y)] log p_y",
            source="SAFT (harmonic), ICML 2026",
        ),
        "deft": Method(
            trust="collision_power",
            value=collision_loss,
            loss="(1 - p_y^c)/c, c = sg[Σ_v p_v²]",
            source="Dynamic Entropy Fine-Tuning",
            arxiv="2602.11424",
        ),
        "chord_phi": Method(
            trust="uncertainty", loss="-sg[p_y (1 - p_y)] log p_y", source="CHORD-φ", arxiv="2508.11408"
        ),
        "trsft": Method(
            trust="capped_probability",
            knobs={"tau": 0.1},
            loss="-sg[min(1, p_y/tau)] log p_y",
            source="TrSFT (TRAPO)",
            arxiv="2512.17636",
        ),
        "rank_tuner": Method(
            trust="relative_rank",
            loss="-sg[p_y (p_y E)^-K] log p_y, E the expected rank, K = log2(1 + max(E, rank))^-2",
            source="RankTuner",
            arxiv="2602.01745",
        ),
        "trim_sft": Method(
            trust="margin",
            knobs={"beta": 1.5, "tau": 0.8},
            loss="-sg[exp(-(Δ - beta)²/(2 tau²))] log p_y, Δ = z_y - max over v ≠ y of z_v",
            source="TrimSFT",
            arxiv="2609.09707",
        ),
        "idft": Method(
            trust="adaptive_power",
            value=adaptive_power_loss,
            knobs={"beta": 1.0},
            loss="-sg[p_y^e] log p_y, e = 1 + λ (clip(exp(-(log p_y + H)/beta), 0.1, 2) - 1)",
            source="IDFT",
            arxiv="2602.12222",
        ),
        "prift": Method(
            group="prior-weighted",
            trust="prior_probability",
            prior="base",
            loss="-π_prior(y) log p_y",
            source="PriFT, probability",
            arxiv="2606.09396",
        ),
        "prift_mass": Method(
            group="prior-weighted",
            trust="prior_mass",
            knobs={"tau": 0.5},
            prior="base",
            loss="-1[u >= tau] log p_y, u = π_prior(y) + Σ of π_prior below it",
            source="PriFT, mass",
            arxiv="2606.09396",
        ),
        "gift": Method(
            group="anchored",
            trust="tilt",
            residual="prior",
            knobs={"beta": 20.0},
            prior="base",
            loss="CE(Q, p), Q ∝ π_prior exp(beta δ)",
            source="GIFT",
            arxiv="2601.09233",
        ),
        "mask_target": Method(
            group="anchored",
            trust="one",
            residual="spared_prior",
            value=spared_divergence,
            knobs={"lam": 1.0},
            prior="base",
            loss="-log p_y + lam KL(π_prior without y‖p without y)",
            source="Mask the Target (lam is ours, the paper's is not known to us)",
            arxiv="2605.29498",
        ),
        "lp_sft": Method(
            group="anchored",
            trust="one",
            residual="spared_top",
            value=spared_cross_entropy,
            knobs={"lam": 1.0, "top_k": 10, "temperature": 1.0},
            prior="base",
            loss="-log p_y + lam CE(π_S, p_S), S the prior's top_k without y",
            source="LP-SFT, its code; there is no paper",
        ),
        "tofu": Method(
            group="signed",
            trust="focal_slope",
            residual="sharpened",
            knobs={"alpha": 3.0, "beta": 0.8},
            value=tempered_label_loss,
            loss="-sg[w] beta log softmax(z/beta)_y, w the slope of the focal loss",
            source="TOFU",
            arxiv="2605.00195",
        ),
        "otr": Method(
            group="signed",
            trust="sampled",
            residual="flattened",
            knobs={"temperature": 1.3, "beta": -0.1},
            loss="-Σ_v sg[q_v] R_v log p_v, q = softmax(z/temperature), R = 1 for y, beta for all others",
            source="One-Token Rollout, in expectation over its samples (constants from secondary sources)",
            arxiv="2509.26313",
        ),
        "distill": Method(
            group="distilling",
            trust="zero",
            residual="prior",
            knobs={"temperature": 1.0},
            prior="model",
            loss="CE(π_prior, p)",
            source="Knowledge distillation",
            arxiv="1503.02531",
        ),
        "distill_hybrid": Method(
            group="distilling",
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
            group="anchored",
            trust="probability",
            residual="guided",
            knobs={"eta": 0.5},
            prior="auto",
            loss="CE(Q, p), Q = p_y δ + (1 - p_y) π̃, π̃ ∝ p^(1-eta) π_prior^eta",
            source="Target-SFT (the paper's eta is not public; 0.5 is our choice)",
            arxiv="2606.11189",
        ),
        "adaptive_sft": Method(
            group="anchored",
            trust="power",
            residual="guided",
            knobs={"alpha": AUTO, "eta": 0.25},
            prior="auto",
            loss="CE(Q, p), Q = p_y^a δ + (1 - p_y^a) π̃, π̃ ∝ p^(1-eta) π_prior^eta, a = exp(-3 q)",
            source="Ours: a is measured once, q the NLL per label that a quarter of the sequences stay below",
        ),
    }
)


def find_method(name: str) -> Method:
    """The row of a published objective.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if not isinstance(name, str) or name not in METHODS:
        near = nearest(name, METHODS) if isinstance(name, str) else []
        meant = f": did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"`method={name!r}` is unknown{meant} Known methods: {', '.join(METHODS)}. For a free combination set "
            "`method=None` with `trust=...` and `residual=...`."
        )
    return METHODS[name]
