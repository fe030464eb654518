"""The implementations that are compared, all of them given the very same inputs.

Every one returns a scalar loss, the mean over the tokens, whose gradient flows to `hidden` and, unless it is frozen,
to `weight`. Providers of one objective compute the same function; `check_agreement` proves it on every run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss

from . import peers
from .inputs import Inputs, Shape


# Relative tolerance of losses and of gradients (as norms), against the first provider of an objective.
_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 5e-2)}
# Of losses where one of the two takes PyTorch's own log-softmax, which is off by 1.4e-4 for V = 151,936 on a CPU.
_OWN_LOG_SOFTMAX, _LOG_SOFTMAX_TOLERANCE = ("dense", "compile", "torch"), 5e-4

# Where these disagree, something is broken and no number is worth having.
_KNOWN_TO_AGREE = ("qtarget", "qtarget-torch", "trl", "dense")

# [N, V] tensors in float32 that a dense provider holds at its peak, rounded up.
_DENSE_COPIES = 7


def _ours(config: QTargetConfig) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        return linear_qtarget_loss(inputs.hidden, inputs.weight, inputs.labels, config).loss

    return loss


def _ours_with_reference(config: QTargetConfig) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        prior = {"prior_hidden": inputs.prior_hidden, "prior_weight": inputs.prior_weight}
        return linear_qtarget_loss(inputs.hidden, inputs.weight, inputs.labels, config, **prior).loss

    return loss


@dataclass(frozen=True)
class Provider:
    """An implementation of an objective.

    `reference`: whether it projects a reference model too. `counterpart`: the TRL provider it is compared with.
    `package`: what must be installed for it, and runs on a GPU only.
    """

    loss: Callable[[Inputs], Tensor]
    objective: str
    reference: bool = False
    counterpart: str | None = None
    package: str | None = None
    gpu_only: bool = False

    def missing(self, device: str) -> str | None:
        """Why it cannot run on a device; None if it can."""
        if self.gpu_only and device != "cuda":
            return "on a CPU it is what `qtarget` is"
        return peers.missing(self.package, device)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients: one forward and one backward pass."""
        loss = self.loss(inputs)
        return loss, torch.autograd.grad(loss, inputs.differentiable)


# TRL has no Target-SFT; its divergence is the only fused loss in it that reads a reference model, so it is the
# counterpart of `target_sft`. `forward_kl` is that very divergence, as the method `distill_hybrid` at lam = 1.
_CONFIGS = {
    "sft": (QTargetConfig("sft"), "nll", False, "trl/nll"),
    "dft": (QTargetConfig("dft"), "dft", False, "trl/dft"),
    "forward_kl": (QTargetConfig("distill_hybrid", lam=1.0), "kl", True, "trl/forward_kl"),
    "target_sft": (QTargetConfig("target_sft"), "target_sft", True, "trl/forward_kl"),
}


def _own(group: str, kernel: str) -> dict[str, "Provider"]:
    return {
        f"{group}/{name}": Provider(
            (_ours_with_reference if reference else _ours)(replace(config, kernel=kernel)),
            objective,
            reference,
            counterpart,
            gpu_only=group != "qtarget",
        )
        for name, (config, objective, reference, counterpart) in _CONFIGS.items()
    }


PROVIDERS = {
    **_own("qtarget", "auto"),
    **_own("qtarget-torch", "torch"),
    "trl/nll": Provider(peers.trl_nll, "nll"),
    "trl/dft": Provider(peers.trl_dft, "dft"),
    "trl/forward_kl": Provider(peers.trl_forward_kl, "kl", True),
    "dense/nll": Provider(peers.dense_nll, "nll", counterpart="trl/nll"),
    "dense/dft": Provider(peers.dense_dft, "dft", counterpart="trl/dft"),
    "dense/target_sft": Provider(peers.dense_target_sft, "target_sft", True, "trl/forward_kl"),
    "compile/nll": Provider(peers.compiled(peers.dense_nll), "nll", counterpart="trl/nll"),
    "compile/dft": Provider(peers.compiled(peers.dense_dft), "dft", counterpart="trl/dft"),
    "compile/target_sft": Provider(peers.compiled(peers.dense_target_sft), "target_sft", True, "trl/forward_kl"),
    "torch/nll": Provider(peers.torch_nll, "nll", counterpart="trl/nll", package="torch"),
    "liger/nll": Provider(peers.liger_nll, "nll", counterpart="trl/nll", package="liger_kernel"),
    "liger/dft": Provider(peers.liger_dft, "dft", counterpart="trl/dft", package="liger_kernel"),
    "liger/forward_kl": Provider(peers.liger_jsd, "kl", True, "trl/forward_kl", "liger_kernel"),
    "liger/distillation": Provider(peers.liger_distillation, "kl", True, "trl/forward_kl", "liger_kernel"),
    "quack/nll": Provider(peers.quack_nll, "nll", counterpart="trl/nll", package="quack"),
    "cce/nll": Provider(peers.cce_nll, "nll", counterpart="trl/nll", package="cut_cross_entropy"),
    "cce-exact/nll": Provider(peers.cce_exact_nll, "nll", counterpart="trl/nll", package="cut_cross_entropy"),
}


def fits(name: str, shape: Shape, device: str) -> bool:
    """Whether the machine has room for full logits; being killed for memory could take others along."""
    if name.split("/")[0] not in ("dense", "compile"):
        return True
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return _DENSE_COPIES * shape.N * shape.V * 4 < free


def available(names: Iterable[str], wanted: Iterable[str] | None, device: str) -> list[str]:
    """The providers that can run here; those asked for by name and missing end the run with the reason.

    Others that are missing are pointed out on the screen.
    """
    found = []
    for name in names:
        reason = PROVIDERS[name].missing(device)
        if reason is None:
            found.append(name)
        elif wanted is not None and name in wanted:
            raise SystemExit(f"{name}: {reason}.")
        elif PROVIDERS[name].package:
            print(f"{name} is left out: {reason}.")
    return found


@contextmanager
def pointed_out(name: str, place: object) -> Iterator[None]:
    """Say on the screen, instead of raising, that a provider cannot do something, so that the others go on.

    Anyone may lack memory; that others' code does not know a device or a size is no error of this package either.
    """
    try:
        yield
    except Exception as error:
        lacks_memory = isinstance(error, torch.OutOfMemoryError)
        if name.startswith("qtarget") and not lacks_memory:
            raise
        reason = "not enough memory" if lacks_memory else f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        print(f"{name} is left out at {place}: {reason}.", flush=True)


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


def check_agreement(names: Iterable[str], inputs: Inputs) -> list[str]:
    """Raise unless providers of one objective give the same loss and gradients; return those that do.

    A library that cannot compute them here, or that computes something else, is pointed out and left out.
    """
    loss_tolerance, grad_tolerance = _TOLERANCES[inputs.hidden.dtype]
    first: dict[str, tuple[str, Tensor, tuple[Tensor, ...]]] = {}
    able = []
    for name in names:
        provider = PROVIDERS[name]
        with pointed_out(name, inputs.shape):
            loss, gradients = provider(inputs)
            able.append(name)
        if name not in able:
            continue
        other, expected, expected_gradients = first.setdefault(provider.objective, (name, loss.detach(), gradients))
        errors = [(loss.detach() - expected).abs() / expected.abs()]
        for gradient, known in zip(gradients, expected_gradients, strict=True):
            errors.append((gradient - known).norm() / known.norm())
        takes_own = any(each.split("/")[0] in _OWN_LOG_SOFTMAX for each in (name, other))
        allowed = max(loss_tolerance, _LOG_SOFTMAX_TOLERANCE) if takes_own else loss_tolerance
        # `not <=` also catches NaN.
        if not (errors[0] <= allowed and max(errors[1:]) <= grad_tolerance):
            able.remove(name)
            message = (
                f"{name} and {other} disagree: relative errors of the loss and of the gradients "
                f"{[f'{error.item():.1e}' for error in errors]}, losses {loss.item():.6f} and {expected.item():.6f}."
            )
            if name.split("/")[0] in _KNOWN_TO_AGREE:
                raise RuntimeError(message)
            print(f"{name} is left out: {message}", flush=True)
    return able
