"""The objectives as their publications write them, and random problems to evaluate them on.

This is what the package is measured against, so nothing of the package is used here: plain PyTorch, a stop-gradient
(`.detach()`) exactly where the publication has one, autograd for the rest. Every formula takes scored tokens only,
`logits[N, V]`, `labels[N]`, and returns one loss per token `[N]`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor


IGNORE = -100


def log_p(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(-1, keepdim=True)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    return values[torch.arange(len(labels)), labels]


def kl(target: Tensor, log_probs: Tensor) -> Tensor:
    """KL(target‖p) of a constant target."""
    return torch.special.xlogy(target, target).sum(-1) - (target * log_probs).sum(-1)


def cross_entropy(target: Tensor, log_probs: Tensor) -> Tensor:
    return -(target * log_probs).sum(-1)


def top_k_entropy(probs: Tensor, top_k: int) -> Tensor:
    k = min(top_k, probs.size(-1))
    top = probs.sort(-1, descending=True).values[:, :k]
    return torch.special.entr(top / top.sum(-1, keepdim=True)).sum(-1) / math.log(k)


def importance(log_ratio: Tensor, sequence_ids: Tensor | None, temperature: float, clip_max: float) -> Tensor:
    weights = torch.empty_like(log_ratio)
    ids = [0] * len(log_ratio) if sequence_ids is None else sequence_ids.tolist()
    for sequence in set(ids):
        inside = torch.tensor([one == sequence for one in ids])
        weights[inside] = math.exp(min(temperature * log_ratio[inside].mean().item(), 700))
    return weights.clamp(0, clip_max)


# --- the published objectives, by the name of the method; their defaults are those of the table in the design ---


def sft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    return -of_label(log_p(logits), labels)


def dft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    log_label = of_label(log_p(logits), labels)
    return -log_label.exp().detach() * log_label


def beyond_log(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, alpha=1.0):
    return (1 - of_label(log_p(logits), labels).exp() ** alpha) / alpha  # differentiated through p


def profit(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, tau=0.1):
    log_label = of_label(log_p(logits), labels)
    return torch.where(log_label.detach().exp() > tau, -log_label, 0.0 * log_label)


def eaft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, top_k=20, alpha=1.0):
    weight = top_k_entropy(logits.detach().softmax(-1), top_k) ** alpha
    return -weight * of_label(log_p(logits), labels)


def iw_sft(
    logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, temperature=1.0, clip_max=16.0
):
    log_label = of_label(log_p(logits), labels)
    log_ratio = (log_label - of_label(log_p(prior_logits), labels)).detach()
    return -importance(log_ratio, sequence_ids, temperature, clip_max) * log_label


def cft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    return -token_weights * of_label(log_p(logits), labels)


def label_smoothing(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.1):
    log_probs = log_p(logits)
    return -(1 - lam) * of_label(log_probs, labels) - lam * log_probs.mean(-1)


def sft_kl(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.1):
    log_probs = log_p(logits)
    return -of_label(log_probs, labels) + lam * kl(prior_logits.softmax(-1).detach(), log_probs)


def asft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.05):
    log_probs = log_p(logits)
    log_label = of_label(log_probs, labels)
    anchor = kl(prior_logits.softmax(-1).detach(), log_probs)
    return -log_label.exp().detach() * log_label + lam * anchor


def psft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, epsilon=0.28):
    log_ratio = of_label(log_p(logits), labels) - of_label(log_p(prior_logits), labels).detach()
    ratio = log_ratio.clamp(max=20).exp()  # as its code does, far beyond 1 + epsilon
    return -torch.minimum(ratio, ratio.clamp(1 - 0.2, 1 + epsilon))  # PPO's clip with advantage 1 and both bounds


def gem(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, beta=0.7):
    log_probs = log_p(logits)
    q = (logits / beta).softmax(-1).detach()
    return -(q * (of_label(log_probs, labels)[:, None] - log_probs)).sum(-1)


def distill(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, temperature=1.0):
    return cross_entropy((prior_logits / temperature).softmax(-1).detach(), log_p(logits))


def distill_hybrid(
    logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.5, temperature=1.0
):
    log_probs = log_p(logits)
    teacher = (prior_logits / temperature).softmax(-1).detach()
    return -(1 - lam) * of_label(log_probs, labels) + lam * kl(teacher, log_probs)


def target_sft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, eta=0.5):
    log_probs = log_p(logits)
    guided = guide(log_probs.detach(), log_p(prior_logits).detach(), eta)
    label_prob = of_label(log_probs.detach(), labels).exp()
    target = (1 - label_prob)[:, None] * guided
    target[torch.arange(len(labels)), labels] += label_prob
    return cross_entropy(target, log_probs)


def guide(log_policy: Tensor, log_prior: Tensor, eta: float) -> Tensor:
    """p^(1-eta) π^eta, normalised; by logarithms, as the product of two confident distributions underflows."""
    return log_p((1 - eta) * log_policy + eta * log_prior).exp()


_ALL = (sft, dft, beyond_log, profit, eaft, iw_sft, cft, label_smoothing, sft_kl, asft, psft, gem, distill)
FORMULAS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (*_ALL, distill_hybrid, target_sft)}

# Knobs other than the defaults, for each method that has any.
OTHER_KNOBS = {
    "beyond_log": [{"alpha": 0.3}, {"alpha": 8.0}],
    "profit": [{"tau": 0.02}, {"tau": 0.9}],
    "eaft": [{"top_k": 3, "alpha": 0.5}, {"top_k": 7, "alpha": 2.0}],
    "iw_sft": [{"temperature": 0.5, "clip_max": 1.05}],
    "label_smoothing": [{"lam": 0.37}, {"lam": 1.0}],
    "sft_kl": [{"lam": 0.8}, {"lam": 3.0}],
    "asft": [{"lam": 0.7}, {"lam": 2.0}],
    "psft": [{"epsilon": 0.05}, {"epsilon": 4.0}],
    "gem": [{"beta": 0.4}, {"beta": 1.9}],
    "distill": [{"temperature": 2.5}, {"temperature": 0.6}],
    "distill_hybrid": [{"lam": 0.2, "temperature": 0.6}],
    "target_sft": [{"eta": 0.2}, {"eta": 1.0}],
}


# --- free combinations: the designs one by one ---
# `x` has log_probs, labels, prior_logits, token_weights, sequence_ids and embeddings of the scored tokens.


def _log_ratio(x: SimpleNamespace) -> Tensor:
    return of_label(x.log_probs, x.labels) - of_label(log_p(x.prior_logits), x.labels)


def _clipped(ratio: Tensor, epsilon: float) -> Tensor:
    return ratio * (ratio < 1 + epsilon)


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
}

# The residual π̃, or a pair (π̃⁺, π̃⁻).
RESIDUAL_FORMULAS = {
    "policy": lambda x: x.log_probs.exp(),
    "uniform": lambda x: torch.full_like(x.log_probs, 1 / x.log_probs.size(-1)),
    "prior": lambda x, *, temperature=1.0: (x.prior_logits / temperature).softmax(-1),
    "guided": lambda x, *, eta=0.5: guide(x.log_probs, log_p(x.prior_logits), eta),
    "sharpened": lambda x, *, beta=0.7: (x.log_probs.exp(), (x.log_probs / beta).softmax(-1)),
    "neighbors": lambda x, *, top_k=20, temperature=1.0: _neighbors(x, top_k, temperature),
}

OTHER_DESIGN_KNOBS = {
    "lam": 0.4,
    "alpha": 0.6,
    "tau": 0.03,
    "top_k": 3,
    "temperature": 1.7,
    "clip_max": 1.05,
    "epsilon": 0.06,
    "eta": 0.8,
    "beta": 1.6,
}


def knobs_in(function: Callable) -> set[str]:
    """Names of the knobs of a formula."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def free_combination(trust: Callable, residual: Callable, *, policy_residual: bool = False) -> Callable[..., Tensor]:
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
        unseen = 0.0
        if isinstance(measures, tuple):
            unseen = cross_entropy(positive, known)
        elif policy_residual:
            unseen = (1 - gamma) * cross_entropy(positive, known)
        return cross_entropy(target, log_probs) - unseen

    return formula


def free_formula(trust: str, residual: str) -> Callable[..., Tensor]:
    """A free combination of two designs by name."""
    return free_combination(
        TRUST_FORMULAS[trust], RESIDUAL_FORMULAS[residual], policy_residual=residual in ("policy", "sharpened")
    )


# --- random problems ---


@dataclass
class Problem:
    """Two heads and their hidden states, labels with some ignored, weights and sequences, all in float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    prior_hidden: Tensor
    prior_weight: Tensor
    prior_bias: Tensor | None
    token_weights: Tensor
    sequence_ids: Tensor
    head: dict[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> Tensor:
        return self.labels != IGNORE

    def _transformed(self, logits: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
        logits = (logits if bias is None else logits + bias) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def logits(self, hidden: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The policy's logits `[N, V]`, as a function of other parameters if given."""
        hidden = self.hidden if hidden is None else hidden
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        scale, cap = self.head.get("logit_scale", 1.0), self.head.get("logit_softcap")
        return self._transformed(hidden @ weight.t(), bias, scale, cap)

    def prior_logits(self) -> Tensor:
        scale, cap = self.head.get("prior_logit_scale", 1.0), self.head.get("prior_logit_softcap")
        return self._transformed(self.prior_hidden @ self.prior_weight.t(), self.prior_bias, scale, cap)

    def leaves(self) -> list[Tensor]:
        """Fresh copies of hidden, weight and bias (if any) that ask for a gradient."""
        return [t.detach().clone().requires_grad_() for t in (self.hidden, self.weight, self.bias) if t is not None]

    def per_token(self, formula: Callable[..., Tensor], logits: Tensor, prior: bool = True, **knobs) -> Tensor:
        """A formula on these logits, `[N]`, zero where the label is ignored."""
        rows = self.scored
        prior_logits = self.prior_logits()[rows] if prior else None
        if "embeddings" in inspect.signature(formula).parameters:
            knobs["embeddings"] = self.weight
        losses = formula(
            logits[rows], self.labels[rows], prior_logits, self.token_weights[rows], self.sequence_ids[rows], **knobs
        )
        return logits.new_zeros(len(rows)).masked_scatter(rows, losses)

    def dense_arguments(self, prior: bool = True) -> dict[str, Tensor]:
        """Keyword arguments of the dense functions."""
        arguments = {"token_weights": self.token_weights, "sequence_ids": self.sequence_ids, "embeddings": self.weight}
        return {**arguments, "prior_logits": self.prior_logits()} if prior else arguments

    def linear_arguments(self, prior: bool = True) -> dict[str, Tensor | float]:
        """Keyword arguments of the fused loss, without the bias."""
        arguments = {"token_weights": self.token_weights, "sequence_ids": self.sequence_ids, **self.head}
        if prior:
            names = ("prior_hidden", "prior_weight", "prior_bias")
            arguments.update({name: getattr(self, name) for name in names})
        return arguments


HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.6, "prior_logit_scale": 1.3},
    "capped": {"logit_scale": 1.4, "logit_softcap": 5.0, "prior_logit_softcap": 7.0},
}


def make_problem(
    tokens: int, vocabulary: int, width: int, seed: int, *, bias: bool = True, head: str = "plain"
) -> Problem:
    """A random problem; a fifth of the labels is ignored, and some rows are made very confident."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, width), normal(vocabulary, width)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    for row in range(1, tokens, 4):  # confident: of the label, then of another token, in turn
        token = labels[row] if row % 8 == 1 else (labels[row] + 1) % vocabulary
        hidden[row] += 12 * weight[token] / weight[token].norm()
    problem = Problem(
        hidden=hidden,
        weight=weight,
        bias=normal(vocabulary) if bias else None,
        labels=labels,
        prior_hidden=hidden[:, : max(1, width - 2)] + 0.5 * normal(tokens, max(1, width - 2)),
        prior_weight=weight[:, : max(1, width - 2)] + 0.3 * normal(vocabulary, max(1, width - 2)),
        prior_bias=normal(vocabulary) if bias else None,
        token_weights=torch.rand(tokens, generator=generator, dtype=torch.float64) * 1.5,
        sequence_ids=torch.randint(3, (tokens,), generator=generator) * 7 - 4,
        head=HEADS[head],
    )
    ignored = torch.rand(tokens, generator=generator) < 0.2
    problem.labels = labels.masked_fill(ignored, IGNORE) if tokens > 1 else labels
    return problem


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the truth, or over `floor` (or 1) where the truth is smaller (or 0)."""
    norm = max(truth.double().norm().item(), floor)
    return (value.double() - truth.double()).norm().item() / (norm or 1.0)
