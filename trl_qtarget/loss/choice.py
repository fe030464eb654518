"""Which kernel does the work: Triton's where they are at home and agree with the plain one, else the plain one.

Before Triton kernels are first used for an objective on a device, they and the plain kernel score the same few random
tokens. So a compiler, driver or device that gets them wrong costs one warning and some speed, not a training run.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..gemm import Head, mixed_gemm_supported, operand_dtype
from ..target.objective import Objective
from ..target.top_k import TopKPrior
from .chunks import Batch, Kernel
from .kernels.plain import PlainKernel
from .kernels.top_k import TopKKernel


logger = logging.getLogger(__name__)

# Four steps of the kernels, the last one ragged. Triton compiles one code for rows that all begin at a multiple of 16
# elements and another for rows that do not: the one that is tried has to be the one that is used.
_TOKENS, _WIDTH = 24, 32
_VOCABULARY = {True: 13008, False: 13003}
# Sums in another order differ by some hundred roundings of float32; a gradient that is rounded to bfloat16 for the
# products may fall on the neighbouring number.
_TOLERANCE, _ROUNDED_TOLERANCE = 1e-4, 1e-2
_agreed: dict[Any, bool] = {}


def check_kernel(name: str, device: torch.device) -> None:
    """Refuse a kernel that cannot run on a device.

    Raises:
        ValueError: `kernel="triton"` without Triton, or on a device that it has no compiler for.
    """
    if name != "triton":
        return
    if not _installed():
        raise ValueError("`kernel='triton'` needs Triton: pip install triton, or choose `kernel='auto'`.")
    if not _at_home(device) and not _interpreted():
        raise ValueError(
            f"`kernel='triton'` does not run on {device.type}: choose `kernel='auto'`, or start Python with "
            "TRITON_INTERPRET=1 to run it, very slowly, in Triton's interpreter."
        )


def make_kernel(name: str, batch: "dict[str, Any]") -> Kernel:
    """The kernel for a batch, given as the arguments of `Batch`: `"torch"`, `"triton"`, or the best that is right."""
    device = batch["hidden"].device
    check_kernel(name, device)
    if name == "triton":
        return _kernel(_folding, batch)
    if name == "auto" and _at_home(device) and _agrees(batch):
        return _kernel(_folding, batch)
    return _kernel(PlainKernel, batch)


def _folding(objective: Objective) -> Kernel:
    from .kernels.folded import FoldingKernel

    return FoldingKernel(objective)


def _kernel(make: Callable[[Objective], Kernel], batch: dict[str, Any]) -> Kernel:
    """The kernel for a batch, inside of the one that reads a top-k prior where it has such a prior."""
    objective, top_k = batch["objective"], batch.get("top_k")
    return make(objective) if top_k is None else TopKKernel(make, objective, top_k, batch["head"].weight.size(0))


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _at_home(device: torch.device) -> bool:
    """Whether Triton compiles for the device."""
    return device.type == "cuda" and _installed()


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _agrees(batch: dict[str, Any]) -> bool:
    """Whether Triton's kernels give what the plain one gives for this objective and device; tried once, remembered."""
    objective, hidden, head = batch["objective"], batch["hidden"], batch["head"]
    knobs, prior = tuple(sorted(objective.knobs.items())), batch["prior_head"]
    key = (hidden.device, operand_dtype(hidden, head.weight), _is_aligned(head))
    key = (*key, *(design.name for design in objective.designs), knobs, objective.uses_prior, head.logit_softcap)
    key = (*key, prior is not None and _is_smaller(prior, head))
    top_k = batch.get("top_k")
    key = (*key, top_k and top_k.tail, top_k and top_k.silent is not None)
    if key not in _agreed:
        try:
            difference = disagreement(batch, _folding)
        except Exception as error:  # a compiler may fail in any way
            difference = f"{type(error).__name__}: {error}"
        _agreed[key] = difference is None
        if difference is not None:
            _warn(difference)
    return _agreed[key]


@cache
def _warn(difference: str) -> None:
    logger.warning(
        f"The Triton kernels are not used on this device, plain torch operations are, which are slower: {difference}"
    )


@torch.no_grad()
def disagreement(batch: dict[str, Any], make: Callable[[Objective], Kernel]) -> str | None:
    """What a kernel computes otherwise than the plain one on a small batch like the given one; None if nothing."""
    small = _small(batch)
    results = []
    for each in (PlainKernel, make):
        tried = Batch(**small, kernel=_kernel(each, small))
        with torch.autocast(small["hidden"].device.type, enabled=False):
            inverse = torch.full((), 1 / _TOKENS, dtype=tried.dtype, device=small["hidden"].device)
            results.append(tried.run(inverse, True, True, small["head"].bias is not None))
    (statistics, gradients), (other_statistics, other_gradients) = results
    for name, value in statistics.items():
        if not torch.allclose(other_statistics[name], value, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            return f"they disagree in `{name}`."
    rounded = any(mixed_gemm_supported(product, tried.operands, gradients[0]) for product in ("mm", "addmm"))
    for name, value, other in zip(("hidden", "weight", "bias"), gradients, other_gradients, strict=True):
        tolerance = _ROUNDED_TOLERANCE if rounded else _TOLERANCE
        if value is not None and not (other - value).norm() <= tolerance * value.norm():
            return f"they disagree in the gradient of `{name}`."
    return None


def _is_aligned(head: Head) -> bool:
    return head.weight.size(0) % 16 == 0


def _is_smaller(prior: Head, head: Head) -> bool:
    """Whether the policy has tokens that the prior has not."""
    return prior.weight.size(0) < head.weight.size(0)


def _small(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of a few random tokens, in all else like the given one. The global random numbers are left alone."""
    hidden, head, prior_head = batch["hidden"], batch["head"], batch["prior_head"]
    vocabulary = _VOCABULARY[_is_aligned(head)]
    generator = torch.Generator(hidden.device).manual_seed(0)

    def normal(*shape: int, like: Tensor, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=hidden.device) * scale
        return values.to(like.dtype)

    def small_head(given: Head) -> Head:
        rows = vocabulary * 3 // 4 if _is_smaller(given, head) else vocabulary
        weight = normal(rows, _WIDTH, like=given.weight, scale=2 * _WIDTH**-0.5 / given.logit_scale)
        bias = None if given.bias is None else normal(rows, like=given.bias)
        return replace(given, weight=weight, bias=bias)

    def if_given(name: str, made: Tensor) -> Tensor | None:
        return None if batch[name] is None else made

    def small_top_k(given: TopKPrior) -> TopKPrior:
        k = min(8, given.ids.size(1))
        ids = torch.rand(_TOKENS, vocabulary, generator=generator, device=hidden.device).argsort(dim=1)[:, :k]
        ids[0, 0] = labels[0]
        events = normal(_TOKENS, k + 1, like=given.log_probs).log_softmax(-1)
        silent = None if given.silent is None else labels % 3 == 0
        return TopKPrior(ids, events[:, :-1], events[:, 0], events[:, -1], given.tail, silent)

    policy = small_head(head)
    labels = torch.randint(vocabulary, (_TOKENS,), generator=generator, device=hidden.device)
    # Some labels that are probable, or every trust would be about zero.
    states = normal(_TOKENS, _WIDTH, like=hidden)
    states[::2] += 3 * policy.weight[labels[::2]].to(states.dtype) * head.logit_scale
    prior_hidden = batch["prior_hidden"]
    return {
        **batch,
        "head": policy,
        "hidden": states,
        "labels": labels,
        "prior_head": None if prior_head is None else small_head(prior_head),
        "prior_hidden": None if prior_hidden is None else normal(_TOKENS, _WIDTH, like=prior_hidden),
        "token_weights": if_given("token_weights", normal(_TOKENS, like=head.weight).abs()),
        "sequence_ids": if_given("sequence_ids", torch.arange(_TOKENS, device=hidden.device) // 5),
        "chunk_tokens": _TOKENS // 2,
        "observer": None,
        "group": None,  # other ranks may have remembered
        "top_k": None if batch.get("top_k") is None else small_top_k(batch["top_k"]),
    }
