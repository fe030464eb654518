"""What every provider is given: hidden states, head and labels, and the same of a reference model."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """N tokens, hidden width H, vocabulary V."""

    N: int
    H: int
    V: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `1024x576x49152` (N x H x V)."""
        return cls(*(int(part) for part in text.lower().split("x")))

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.V}"


@dataclass(frozen=True)
class Inputs:
    """Hidden states, head and labels, and hidden states and head of a reference model of the same width."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    prior_hidden: Tensor
    prior_weight: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """What the loss is differentiated by."""
        return tuple(value for value in (self.hidden, self.weight) if value.requires_grad)

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return Shape(len(self.hidden), self.hidden.size(1), len(self.weight))

    def frozen(self) -> "Inputs":
        """The same tensors, with a head that is not trained, as under LoRA."""
        return replace(self, weight=self.weight.detach())


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random inputs with the probabilities of a trained model: labels from hopeless to certain, a prior nearby.

    The logits of the other tokens have a standard deviation of 2; a multiple of the label's row lifts its logit by 0
    to 20. The values hardly matter for the time, but near-uniform ones would prove little about agreement.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight = normal(shape.V, shape.H).mul_(2 * shape.H**-0.5)
    labels = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
    lift = torch.rand(shape.N, 1, generator=generator, device=device) * 5
    hidden = normal(shape.N, shape.H).addcmul_(lift, weight[labels])
    prior_hidden = normal(shape.N, shape.H).mul_(0.3).add_(hidden)
    prior_weight = normal(shape.V, shape.H).mul_(0.2 * shape.H**-0.5).add_(weight)
    hidden, weight, prior_hidden, prior_weight = (
        value.to(dtype) for value in (hidden, weight, prior_hidden, prior_weight)
    )
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), labels, prior_hidden, prior_weight)
