"""Random problems to evaluate objectives on: two heads, hidden states and labels."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


IGNORE = -100


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

    def shared_prior_logits(self) -> Tensor:
        """The prior's logits of the policy's tokens: without those that only the prior has, `-inf` if missing."""
        logits, vocabulary = self.prior_logits(), self.weight.size(0)
        missing = logits.new_full((len(logits), max(0, vocabulary - logits.size(1))), -torch.inf)
        return torch.cat([logits[:, :vocabulary], missing], dim=1)

    def leaves(self) -> list[Tensor]:
        """Fresh copies of hidden, weight and bias (if any) that ask for a gradient."""
        return [t.detach().clone().requires_grad_() for t in (self.hidden, self.weight, self.bias) if t is not None]

    def per_token(self, formula: Callable[..., Tensor], logits: Tensor, prior: bool = True, **knobs) -> Tensor:
        """A formula on these logits, `[N]`, zero where the label is ignored."""
        rows = self.scored
        prior_logits = self.shared_prior_logits()[rows] if prior else None
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
