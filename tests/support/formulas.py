"""The objectives as their publications write them.

This is what the package is measured against, so nothing of the package is used here: plain PyTorch, a stop-gradient
(`.detach()`) exactly where the publication has one, autograd for the rest. Every formula takes scored tokens only,
`logits[N, V]`, `labels[N]`, and returns one loss per token `[N]`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


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


# --- objectives of 2026 ---


def infosft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, tau=0.93):
    log_label = of_label(log_p(logits), labels)
    p = log_label.detach().exp()
    weight = p * torch.relu(1 - torch.logit(p, eps=1e-300) / math.log(tau / (1 - tau)))
    return -weight * log_label


def saft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.5):
    log_label = of_label(log_p(logits), labels)
    p = log_label.detach().exp()
    return -p / (lam + (1 - lam) * p) * log_label


def deft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    log_probs = log_p(logits)
    exponent = (log_probs.exp() ** 2).sum(-1).detach()
    return (1 - of_label(log_probs, labels).exp() ** exponent) / exponent  # differentiated through p


def chord_phi(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    log_label = of_label(log_p(logits), labels)
    p = log_label.detach().exp()
    return -p * (1 - p) * log_label


def trsft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, tau=0.1):
    log_label = of_label(log_p(logits), labels)
    p = log_label.detach().exp()
    return -p / p.clamp(min=tau) * log_label


def rank_tuner(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    log_probs = log_p(logits)
    log_label, known = of_label(log_probs, labels), log_probs.detach().exp()
    bits = torch.special.entr(known).sum(-1) / math.log(2)
    expected = torch.where(bits >= 2, 2**bits / 4 + 1, 1 + (1 - known.max(-1).values))
    rank = (logits >= of_label(logits, labels)[:, None]).sum(-1)
    power = 1 / torch.log2(torch.maximum(expected, rank).clamp(min=1) + 1) ** 2
    p = log_label.detach().exp()
    return -p * (p * expected).clamp(min=1e-6) ** -power * log_label


def trim_sft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, beta=1.5, tau=0.8):
    log_label, rival = of_label(log_p(logits), labels), log_p(logits).detach().clone()
    rival[torch.arange(len(labels)), labels] = -math.inf
    margin = log_label.detach() - rival.max(-1).values
    return -torch.exp(-((margin - beta) ** 2) / (2 * tau**2)) * log_label


def idft(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, beta=1.0):
    """At the end of a training, where the schedule of its exponent has come to one."""
    log_probs = log_p(logits)
    p = of_label(log_probs, labels).exp().clamp(min=1e-10)
    phi = p.detach().log() + torch.special.entr(log_probs.detach().exp()).sum(-1)
    return -(p.detach() ** torch.exp(-phi / beta).clamp(0.1, 2)) * p.log()


def prift(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None):
    return -of_label(log_p(prior_logits), labels).exp().detach() * of_label(log_p(logits), labels)


def prift_mass(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, tau=0.5):
    prior = prior_logits.softmax(-1).detach()
    label = of_label(prior, labels)
    kept = (prior * (prior < label[:, None])).sum(-1) + label >= tau
    return -kept.to(prior.dtype) * of_label(log_p(logits), labels)


def gift(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, beta=20.0):
    raised = log_p(prior_logits).detach().clone()
    raised[torch.arange(len(labels)), labels] += beta
    return cross_entropy(raised.softmax(-1), log_p(logits))


def asft_k3(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.05):
    log_label = of_label(log_p(logits), labels)
    log_ratio = (of_label(log_p(prior_logits), labels).detach() - log_label).clamp(-10, 10)
    return -log_label.exp().detach() * log_label + lam * (log_ratio.exp() - 1 - log_ratio)


def asft_k1(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=0.05):
    """Without `-lam log π_prior(y)`, which has no gradient."""
    log_label = of_label(log_p(logits), labels)
    return -log_label.exp().detach() * log_label + lam * log_label


def mask_target(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=1.0):
    log_probs = log_p(logits)
    anchor = kl(log_without(prior_logits.detach(), labels).exp(), log_without(logits, labels))
    return -of_label(log_probs, labels) + lam * anchor


def lp_sft(
    logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, lam=1.0, top_k=10, temperature=1.0
):
    losses = -of_label(log_p(logits), labels)
    anchors = []
    for policy, prior, label in zip(logits, prior_logits.detach(), labels.tolist(), strict=True):
        order = prior.argsort(descending=True).tolist()
        support = [token for token in order[:top_k] if token != label]
        if len(support) == 1:
            support += [token for token in order[top_k:] if token != label][:1]
        if len(support) < 2:
            anchors.append(0.0 * policy.sum())
            continue
        anchors.append(cross_entropy((prior[support] / temperature).softmax(-1), log_p(policy[support])))
    return losses + lam * torch.stack(anchors)


def tofu(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, alpha=3.0, beta=0.8):
    log_label = of_label(log_p(logits), labels).detach()
    p = log_label.exp()
    weight = (1 - p) ** alpha - alpha * p * (1 - p) ** (alpha - 1) * log_label
    return -weight * beta * of_label(log_p(logits / beta), labels)


def otr(logits, labels, prior_logits=None, token_weights=None, sequence_ids=None, *, temperature=1.3, beta=-0.1):
    """Its expectation over what is sampled."""
    log_probs = log_p(logits)
    q = (logits / temperature).softmax(-1).detach()
    reward = torch.full_like(q, beta)
    reward[torch.arange(len(labels)), labels] = 1.0
    return cross_entropy(q * reward, log_probs)


def log_without(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities without the label, which gets a low finite number that no product with zero turns into NaN."""
    label = torch.zeros_like(logits, dtype=torch.bool)
    label[torch.arange(len(labels)), labels] = True
    return log_p(logits.masked_fill(label, -1e4))


def guide(log_policy: Tensor, log_prior: Tensor, eta: float) -> Tensor:
    """p^(1-eta) π^eta, normalised; by logarithms, as the product of two confident distributions underflows."""
    return log_p((1 - eta) * log_policy + eta * log_prior).exp()


_ALL = (sft, dft, beyond_log, profit, eaft, iw_sft, cft, label_smoothing, sft_kl, asft, psft, gem, distill)
_OF_2026 = (
    infosft,
    saft,
    deft,
    chord_phi,
    trsft,
    rank_tuner,
    trim_sft,
    idft,
    prift,
    prift_mass,
    gift,
    asft_k3,
    asft_k1,
)
_OF_2026 = (*_OF_2026, mask_target, lp_sft, tofu, otr)
OF_2026 = frozenset(f.__name__ for f in _OF_2026)
FORMULAS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (*_ALL, distill_hybrid, target_sft, *_OF_2026)}

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
    "infosft": [{"tau": 0.7}],
    "saft": [{"lam": 0.1}, {"lam": 1.0}],
    "trsft": [{"tau": 0.5}],
    "trim_sft": [{"beta": 0.2, "tau": 2.0}],
    "idft": [{"beta": 3.0}],
    "prift_mass": [{"tau": 0.05}],
    "gift": [{"beta": 2.0}],
    "asft_k3": [{"lam": 0.4}],
    "asft_k1": [{"lam": 0.4}],
    "mask_target": [{"lam": 0.3}],
    "lp_sft": [{"top_k": 2, "lam": 0.5, "temperature": 2.0}],
    "tofu": [{"alpha": 0.5, "beta": 1.4}],
    "otr": [{"temperature": 0.8, "beta": 0.3}],
}
