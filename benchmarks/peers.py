"""What others have written, called as their trainers or documentation call it; and plain PyTorch.

Libraries are imported when they are called, so those that are not installed are only left out.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_qtarget import QTargetConfig

from .inputs import Inputs


# What SFTTrainer's fused head asks of TRL's kernel (trl.trainer.utils and trl.trainer.sft_trainer, 1.16).
_TRL_CHUNK_SIZE = 32768
_TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")
_ETA = QTargetConfig("target_sft").knobs["eta"]


# --- TRL's, as its trainers call them ---


def _trl_log_probs(inputs: Inputs) -> Tensor:
    arguments = (inputs.hidden, inputs.weight, None, inputs.labels, 1.0, _TRL_CHUNK_SIZE, None, 1.0, _TRL_OUTPUTS)
    return ChunkedLogProbFunction.apply(*arguments)[0]


def trl_nll(inputs: Inputs) -> Tensor:
    return -_trl_log_probs(inputs).sum() / len(inputs.labels)


def trl_dft(inputs: Inputs) -> Tensor:
    log_probs = _trl_log_probs(inputs)
    return (-log_probs * log_probs.exp().detach()).sum() / len(inputs.labels)


def trl_forward_kl(inputs: Inputs) -> Tensor:
    student, teacher = (inputs.hidden, inputs.weight, None), (inputs.prior_hidden, inputs.prior_weight, None)
    return ChunkedDivergenceFunction.apply(*student, *teacher, 0.0)[0].sum() / len(inputs.labels)


# --- dense: full logits, fp32 softmax, autograd ---


def dense_dft(inputs: Inputs) -> Tensor:
    log_probs = F.linear(inputs.hidden, inputs.weight).float().log_softmax(-1)
    label_log_probs = log_probs.gather(1, inputs.labels[:, None])
    return (-label_log_probs * label_log_probs.detach().exp()).mean()


def dense_target_sft(inputs: Inputs) -> Tensor:
    log_probs = F.linear(inputs.hidden, inputs.weight).float().log_softmax(-1)
    with torch.no_grad():
        prior_log_probs = F.linear(inputs.prior_hidden, inputs.prior_weight).float().log_softmax(-1)
        target = torch.lerp(log_probs, prior_log_probs, _ETA).softmax(-1)
        trust = log_probs.gather(1, inputs.labels[:, None]).exp()
        target = target.mul_(1 - trust).scatter_add_(1, inputs.labels[:, None], trust)
    return -(target * log_probs).sum(-1).mean()


def dense_nll(inputs: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(inputs.hidden, inputs.weight).float(), inputs.labels)


def compiled(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """A dense loss under `torch.compile`, compiled on its first call."""

    @cache
    def function() -> Callable[..., Tensor]:  # made once
        def of_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, prior: Tensor, prior_weight: Tensor) -> Tensor:
            return loss(Inputs(hidden, weight, labels, prior, prior_weight))

        return torch.compile(of_tensors, dynamic=False)

    def call(inputs: Inputs) -> Tensor:
        tensors = (inputs.hidden, inputs.weight, inputs.labels, inputs.prior_hidden, inputs.prior_weight)
        return function()(*tensors)

    return call


# --- PyTorch's own ---


def torch_nll(inputs: Inputs) -> Tensor:
    """In chunks, with the options that it chooses itself."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, options=options)


# --- Liger ---


def liger_nll(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels)


def liger_dft(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, use_token_scaling=True)


def liger_jsd(inputs: Inputs) -> Tensor:
    """Its fused linear JSD at beta = 0, the forward KL."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    teacher = (inputs.prior_hidden, inputs.prior_weight)
    return liger_fused_linear_jsd(inputs.hidden, inputs.weight, *teacher, inputs.labels, jsd_beta=0.0)


def liger_distillation(inputs: Inputs) -> Tensor:
    """Its distillation base with the forward KL alone, which always computes the gradient of the head."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return loss(inputs.hidden, inputs.weight, inputs.prior_hidden, inputs.prior_weight, inputs.labels)


# --- Apple's cut cross-entropy ---


def cce_nll(inputs: Inputs) -> Tensor:
    """As its documentation calls it: gradients below its threshold are left out."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels)


def cce_exact_nll(inputs: Inputs) -> Tensor:
    """Without that filter."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, filter_eps=None)


# --- Quack ---


def quack_nll(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels)


def missing(package: str | None, device: str) -> str | None:
    """Why a provider that needs a package, and with it a GPU, cannot run here; None if it can."""
    if package is None:
        return None
    if package == "torch":
        return None if hasattr(F, "linear_cross_entropy") else "this PyTorch has no `linear_cross_entropy`"
    if importlib.util.find_spec(package) is None:
        return f"{package.replace('_', '-')} is not installed"
    return None if device == "cuda" else "its kernels need a GPU"
