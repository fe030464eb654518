"""Trusts and residuals one by one, as formulas that use nothing of the package, and the objective of any two."""

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from formulas import cross_entropy, guide, importance, log_p, log_without, of_label, top_k_entropy
from torch import Tensor


# `x` has log_probs, labels, prior_logits, token_weights, sequence_ids and embeddings of the scored tokens.


def _log_ratio(x: SimpleNamespace) -> Tensor:
    return of_label(x.log_probs, x.labels) - of_label(log_p(x.prior_logits), x.labels)


def _clipped(ratio: Tensor, epsilon: float) -> Tensor:
    return ratio * (ratio < 1 + epsilon)


def _prior(x: SimpleNamespace) -> Tensor:
    return of_label(x.prior_logits.softmax(-1), x.labels)


def _mass_up_to_label(x: SimpleNamespace, tau: float) -> Tensor:
    prior, label = x.prior_logits.softmax(-1), _prior(x)
    return ((prior * (prior < label[:, None])).sum(-1) + label >= tau).to(prior.dtype)


def _rank_weight(x: SimpleNamespace, p: Tensor) -> Tensor:
    known = x.log_probs.exp()
    bits = torch.special.entr(known).sum(-1) / math.log(2)
    expected = torch.where(bits >= 2, 2**bits / 4 + 1, 2 - known.max(-1).values)
    rank = (x.log_probs >= of_label(x.log_probs, x.labels)[:, None]).sum(-1)
    return p * (p * expected).clamp(min=1e-6) ** -(1 / torch.log2(torch.maximum(expected, rank) + 1) ** 2)


def _margin(x: SimpleNamespace) -> Tensor:
    rival = x.log_probs.clone()
    rival[torch.arange(len(x.labels)), x.labels] = -math.inf
    return of_label(x.log_probs, x.labels) - rival.max(-1).values


def _adaptive(x: SimpleNamespace, p: Tensor, beta: float) -> Tensor:
    phi = p.clamp(min=1e-10).log() + torch.special.entr(x.log_probs.exp()).sum(-1)
    return torch.where(p >= 1e-10, p ** torch.exp(-phi / beta).clamp(0.1, 2), 0.0)


def _spared(x: SimpleNamespace, lam: float, prior: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    return x.log_probs.exp() + lam * (prior.exp() - policy.exp()), x.log_probs.exp()


def _spared_top(x: SimpleNamespace, lam: float, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    positive = x.log_probs.exp().clone()
    for row, label in enumerate(x.labels.tolist()):
        order = x.prior_logits[row].argsort(descending=True).tolist()
        support = [token for token in order[:top_k] if token != label]
        if len(support) == 1:
            support += [token for token in order[top_k:] if token != label][:1]
        if len(support) > 1:
            prior = (x.prior_logits[row, support] / temperature).softmax(-1)
            positive[row, support] += lam * (prior - x.log_probs[row, support].softmax(-1))
    return positive, x.log_probs.exp()


def _neighbors(x: SimpleNamespace, top_k: int, temperature: float) -> Tensor:
    residual = torch.zeros_like(x.log_probs)
    for row, label in enumerate(x.labels.tolist()):
        cosine = torch.nn.functional.cosine_similarity(x.embeddings, x.embeddings[label], dim=-1)
        others = sorted((-cosine[token].item(), token) for token in range(len(cosine)) if token != label)[:top_k]
        weights = [math.exp(-minus / temperature) for minus, _ in others]
        for (_, token), weight in zip(others, weights, strict=True):
            residual[row, token] = weight / sum(weights)
    return residual


TRUST_FORMULAS = {
    "one": lambda x, p: torch.ones_like(p),
    "zero": lambda x, p: torch.zeros_like(p),
    "constant": lambda x, p, *, lam=0.1: torch.full_like(p, 1 - lam),
    "anchor": lambda x, p, *, lam=0.1: torch.full_like(p, 1 / (1 + lam)),
    "probability": lambda x, p: p,
    "probability_anchor": lambda x, p, *, lam=0.05: p / (p + lam),
    "power": lambda x, p, *, alpha=1.0: p**alpha,
    "threshold": lambda x, p, *, tau=0.1: (p > tau).to(p.dtype),
    "entropy": lambda x, p, *, top_k=20, alpha=1.0: top_k_entropy(x.log_probs.exp(), top_k) ** alpha,
    "importance": lambda x, p, *, temperature=1.0, clip_max=16.0: importance(
        _log_ratio(x), x.sequence_ids, temperature, clip_max
    ),
    "clipped_ratio": lambda x, p, *, epsilon=0.28: _clipped(_log_ratio(x).exp(), epsilon),
    "token_weights": lambda x, p: x.token_weights,
    "informative": lambda x, p, *, tau=0.93: (
        p * torch.relu(1 - torch.logit(p, eps=1e-300) / math.log(tau / (1 - tau)))
    ),
    "tilt": lambda x, p, *, beta=20.0: 1 / (1 + 1 / (_prior(x) * math.expm1(beta))),
    "prior_probability": lambda x, p: _prior(x),
    "prior_mass": lambda x, p, *, tau=0.5: _mass_up_to_label(x, tau),
    "collision_power": lambda x, p: p ** (x.log_probs.exp() ** 2).sum(-1),
    "harmonic": lambda x, p, *, lam=0.5: p / (lam + (1 - lam) * p),
    "focal_slope": lambda x, p, *, alpha=3.0: (1 - p) ** alpha - alpha * p * (1 - p) ** (alpha - 1) * p.log(),
    "uncertainty": lambda x, p: p * (1 - p),
    "relative_rank": lambda x, p: _rank_weight(x, p),
    "margin": lambda x, p, *, beta=1.5, tau=0.8: torch.exp(-((_margin(x) - beta) ** 2) / (2 * tau**2)),
    "capped_probability": lambda x, p, *, tau=0.1: p / p.clamp(min=tau),
    "adaptive_power": lambda x, p, *, beta=1.0: _adaptive(x, p, beta),
    "ratio_anchor": lambda x, p, *, lam=0.05: (
        p + lam * torch.where(_log_ratio(x).abs() <= 10, (-_log_ratio(x)).exp() - 1, 0.0)
    ),
    "shifted_probability": lambda x, p, *, lam=0.05: p - lam,
    "sampled": lambda x, p, *, temperature=1.3, beta=-0.1: (
        (1 - beta) * of_label((x.log_probs / temperature).softmax(-1), x.labels)
    ),
}

# The residual π̃, or a pair (π̃⁺, π̃⁻).
RESIDUAL_FORMULAS = {
    "policy": lambda x: x.log_probs.exp(),
    "uniform": lambda x: torch.full_like(x.log_probs, 1 / x.log_probs.size(-1)),
    "prior": lambda x, *, temperature=1.0: (x.prior_logits / temperature).softmax(-1),
    "guided": lambda x, *, eta=0.5: guide(x.log_probs, log_p(x.prior_logits), eta),
    "sharpened": lambda x, *, beta=0.7: (x.log_probs.exp(), (x.log_probs / beta).softmax(-1)),
    "neighbors": lambda x, *, top_k=20, temperature=1.0: _neighbors(x, top_k, temperature),
    "flattened": lambda x, *, temperature=1.3, beta=-0.1: (
        (1 - beta) * x.log_probs.exp() + beta * (x.log_probs / temperature).softmax(-1),
        x.log_probs.exp(),
    ),
    "spared_prior": lambda x, *, lam=1.0: _spared(
        x, lam, log_without(x.prior_logits, x.labels), log_without(x.log_probs, x.labels)
    ),
    "spared_top": lambda x, *, lam=1.0, top_k=10, temperature=1.0: _spared_top(x, lam, top_k, temperature),
}
# What a residual leaves with the policy, as a function of γ: the value leaves its cross-entropy out.
POLICY_SHARES = {
    "policy": lambda gamma, knobs: 1 - gamma,
    "sharpened": lambda gamma, knobs: torch.ones_like(gamma),
    "flattened": lambda gamma, knobs: 1 - knobs.get("beta", -0.1) - gamma,
    "spared_prior": lambda gamma, knobs: 1 - gamma,
    "spared_top": lambda gamma, knobs: 1 - gamma,
}

# Each trust with a residual that is the policy and with a mixture, each residual with a smooth and with a sharp trust:
# for tests that would take long over all pairs.
SOME_PAIRS = [
    (trust, residual)
    for trust in TRUST_FORMULAS
    for residual in RESIDUAL_FORMULAS
    if residual in ("policy", "guided") or trust in ("probability", "threshold")
]

OTHER_DESIGN_KNOBS = {
    "lam": 0.4,
    "alpha": 0.6,
    "tau": 0.6,
    "top_k": 3,
    "temperature": 1.7,
    "clip_max": 1.05,
    "epsilon": 0.06,
    "eta": 0.8,
    "beta": 0.6,
}


def knobs_in(function: Callable) -> set[str]:
    """Names of the knobs of a formula."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def free_combination(
    trust: Callable, residual: Callable, policy_share: Callable[[Tensor, dict], Tensor] | None = None
) -> Callable[..., Tensor]:
    """CE to the detached target of a trust and a residual, without CE(sg[p], p), which is no news to anyone."""

    def formula(
        logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, embeddings=None, **knobs
    ) -> Tensor:
        log_probs = log_p(logits)
        known = log_probs.detach()
        x = SimpleNamespace(
            log_probs=known,
            labels=labels,
            prior_logits=known if prior_logits is None else prior_logits.detach(),
            token_weights=token_weights,
            sequence_ids=sequence_ids,
            embeddings=embeddings,
        )
        gamma = trust(x, of_label(known, labels).exp(), **{k: v for k, v in knobs.items() if k in knobs_in(trust)})
        measures = residual(x, **{k: v for k, v in knobs.items() if k in knobs_in(residual)})
        positive, negative = measures if isinstance(measures, tuple) else (measures, measures)
        target = positive - gamma[:, None] * negative
        target[torch.arange(len(labels)), labels] += gamma
        unseen = 0.0 if policy_share is None else policy_share(gamma, knobs) * cross_entropy(known.exp(), known)
        return cross_entropy(target, log_probs) - unseen

    return formula


def free_formula(trust: str, residual: str) -> Callable[..., Tensor]:
    """A free combination of two designs by name."""
    return free_combination(TRUST_FORMULAS[trust], RESIDUAL_FORMULAS[residual], POLICY_SHARES.get(residual))
