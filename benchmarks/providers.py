"""The implementations that are compared, all of them given the very same inputs: ours, TRL's, plain dense PyTorch.

Every one returns a scalar loss, the mean over the tokens, whose gradient flows to `hidden` and, unless it is frozen,
to `weight`. Providers of one objective compute the same function; `check_agreement` proves it on every run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_qtarget import QTargetConfig, linear_qtarget_loss


# What SFTTrainer's fused head asks of TRL's kernel (trl.trainer.utils and trl.trainer.sft_trainer, 1.16).
_TRL_CHUNK_SIZE = 32768
_TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")
# Relative tolerance of losses and of gradients (as norms), against the first provider of an objective.
_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 5e-2)}
_ETA = QTargetConfig("target_sft").knobs["eta"]


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


# --- ours ---


def _ours(config: QTargetConfig) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        return linear_qtarget_loss(inputs.hidden, inputs.weight, inputs.labels, config).loss

    return loss


def _ours_with_reference(config: QTargetConfig) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        prior = {"prior_hidden": inputs.prior_hidden, "prior_weight": inputs.prior_weight}
        return linear_qtarget_loss(inputs.hidden, inputs.weight, inputs.labels, config, **prior).loss

    return loss


# --- TRL's, as its trainers call them ---


def _trl_log_probs(inputs: Inputs) -> Tensor:
    arguments = (inputs.hidden, inputs.weight, None, inputs.labels, 1.0, _TRL_CHUNK_SIZE, None, 1.0, _TRL_OUTPUTS)
    return ChunkedLogProbFunction.apply(*arguments)[0]


def _trl_nll(inputs: Inputs) -> Tensor:
    return -_trl_log_probs(inputs).sum() / len(inputs.labels)


def _trl_dft(inputs: Inputs) -> Tensor:
    log_probs = _trl_log_probs(inputs)
    return (-log_probs * log_probs.exp().detach()).sum() / len(inputs.labels)


def _trl_forward_kl(inputs: Inputs) -> Tensor:
    student, teacher = (inputs.hidden, inputs.weight, None), (inputs.prior_hidden, inputs.prior_weight, None)
    return ChunkedDivergenceFunction.apply(*student, *teacher, 0.0)[0].sum() / len(inputs.labels)


# --- dense: full logits, fp32 softmax, autograd ---


def _dense_dft(inputs: Inputs) -> Tensor:
    log_probs = F.linear(inputs.hidden, inputs.weight).float().log_softmax(-1)
    label_log_probs = log_probs.gather(1, inputs.labels[:, None])
    return (-label_log_probs * label_log_probs.detach().exp()).mean()


def _dense_target_sft(inputs: Inputs) -> Tensor:
    log_probs = F.linear(inputs.hidden, inputs.weight).float().log_softmax(-1)
    with torch.no_grad():
        prior_log_probs = F.linear(inputs.prior_hidden, inputs.prior_weight).float().log_softmax(-1)
        target = torch.lerp(log_probs, prior_log_probs, _ETA).softmax(-1)
        trust = log_probs.gather(1, inputs.labels[:, None]).exp()
        target = target.mul_(1 - trust).scatter_add_(1, inputs.labels[:, None], trust)
    return -(target * log_probs).sum(-1).mean()


@dataclass(frozen=True)
class Provider:
    """An implementation of an objective.

    `reference`: whether it projects a reference model too. `counterpart`: the TRL provider it is compared with.
    """

    loss: Callable[[Inputs], Tensor]
    objective: str
    reference: bool = False
    counterpart: str | None = None

    def __call__(self, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients: one forward and one backward pass."""
        loss = self.loss(inputs)
        return loss, torch.autograd.grad(loss, inputs.differentiable)


# TRL has no Target-SFT; its divergence is the only fused loss in it that reads a reference model, so it is the
# counterpart of `target_sft`. `qtarget/forward_kl` is that very divergence, as the method `distill_hybrid` at lam = 1.
PROVIDERS = {
    "qtarget/sft": Provider(_ours(QTargetConfig("sft")), "nll", counterpart="trl/nll"),
    "trl/nll": Provider(_trl_nll, "nll"),
    "qtarget/dft": Provider(_ours(QTargetConfig("dft")), "dft", counterpart="trl/dft"),
    "trl/dft": Provider(_trl_dft, "dft"),
    "dense/dft": Provider(_dense_dft, "dft", counterpart="trl/dft"),
    "qtarget/forward_kl": Provider(
        _ours_with_reference(QTargetConfig("distill_hybrid", lam=1.0)), "kl", True, "trl/forward_kl"
    ),
    "trl/forward_kl": Provider(_trl_forward_kl, "kl", True),
    "qtarget/target_sft": Provider(
        _ours_with_reference(QTargetConfig("target_sft")), "target_sft", True, "trl/forward_kl"
    ),
    "dense/target_sft": Provider(_dense_target_sft, "target_sft", True, "trl/forward_kl"),
}


def floor(inputs: Inputs, reference: bool) -> Callable[[], None]:
    """The bare matrix products that a loss cannot do without, into preallocated outputs.

    Logits and gradient of the hidden states; gradient of the head unless frozen; the reference's logits if asked for.
    Each of N·V·H multiply-adds, in the inputs' dtype.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.empty_like(weight) if inputs.weight.requires_grad else None

    def products() -> None:
        if reference:
            torch.mm(inputs.prior_hidden, inputs.prior_weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits.t(), hidden, out=grad_weight)

    return products


def check_agreement(names: Iterable[str], inputs: Inputs) -> None:
    """Raise unless providers of one objective give the same loss and gradients."""
    loss_tolerance, grad_tolerance = _TOLERANCES[inputs.hidden.dtype]
    first: dict[str, tuple[str, Tensor, tuple[Tensor, ...]]] = {}
    for name in names:
        provider = PROVIDERS[name]
        loss, gradients = provider(inputs)
        other, expected, expected_gradients = first.setdefault(provider.objective, (name, loss.detach(), gradients))
        errors = [(loss.detach() - expected).abs() / expected.abs()]
        for gradient, known in zip(gradients, expected_gradients, strict=True):
            errors.append((gradient - known).norm() / known.norm())
        # `not <=` also catches NaN.
        if not (errors[0] <= loss_tolerance and max(errors[1:]) <= grad_tolerance):
            raise RuntimeError(
                f"{name} and {other} disagree: relative errors of the loss and of the gradients "
                f"{[f'{error.item():.1e}' for error in errors]}, losses {loss.item():.6f} and {expected.item():.6f}."
            )
