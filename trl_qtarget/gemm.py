"""The LM head and the matrix products of the fused loss, with float32 results and sums whatever the operands' dtype.

Half-precision operands keep their fast tensor cores where the device has products of bf16 with fp32 results, which is
tried once; elsewhere they are raised to the result's dtype slice by slice, so that no full-precision copy of the whole
head is ever made.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


logger = logging.getLogger(__name__)

# Rows of the head raised to full precision at a time: 16 Mi elements, 64 MiB in float32.
_SLICE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Head:
    """An LM head: `logits = softcap · tanh(scale · (hidden @ weight.T + bias) / softcap)`; no cap without `softcap`.

    `weight[V, H]`, `bias[V]` or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def detach(self) -> "Head":
        """The same head without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, self.logit_scale, self.logit_softcap)

    def first(self, rows: int) -> "Head":
        """The head of the first `rows` tokens: views, no copies."""
        bias = None if self.bias is None else self.bias[:rows]
        return Head(self.weight[:rows], bias, self.logit_scale, self.logit_softcap)

    def transform(self, logits: Tensor) -> None:
        """Turn `hidden @ weight.T` into logits, in place."""
        if self.bias is not None:
            logits.add_(self.bias.to(logits.dtype))
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.logit_softcap is not None:
            logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of `transform`'s result with respect to `hidden @ weight.T`, from the result."""
        if self.logit_softcap is None:
            return self.logit_scale
        return (logits / self.logit_softcap).square_().neg_().add_(1.0).mul_(self.logit_scale)


def result_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    """dtype of logits, statistics and accumulators: float64 for float64 operands, float32 for all others."""
    return torch.float64 if operand_dtype == torch.float64 else torch.float32


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """dtype that the operands are rounded to before a product: autocast's inside autocast, else their common one."""
    device, common = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    # Autocast leaves float64 alone, in PyTorch's own products too.
    if torch.is_autocast_enabled(device) and common != torch.float64:
        return torch.get_autocast_dtype(device)
    return common


@dataclass(frozen=True)
class Support:
    """Whether something can be used: as a condition, and in words why not."""

    refusal: str | None = None

    def __bool__(self) -> bool:
        return self.refusal is None


def _mm(out: Tensor, left: Tensor, right: Tensor) -> None:
    torch.mm(left, right, out_dtype=out.dtype, out=out)


def _addmm(out: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


_MIXED = {"mm": _mm, "addmm": _addmm}


def mixed_gemm_supported(product: str, operands: torch.dtype, out: Tensor) -> Support:
    """Whether `product`, "mm" or "addmm", takes such operands for sums in the dtype of `out`, on its device."""
    # fp16 is left out: a gradient of s (p - Q)/N underflows in fp16, and its loss scale is not known in the forward.
    # Results are float64 where a bf16 prior meets a float64 policy; no such product exists.
    if (operands, out.dtype) != (torch.bfloat16, torch.float32):
        return Support(f"{operands} operands are not multiplied into {out.dtype} results")
    return _tried(product, out.device, out.is_contiguous())


@cache
def _tried(product: str, device: torch.device, contiguous: bool = True) -> Support:
    """Whether `product` of bfloat16 operands is right in float32, from a few numbers, once per device.

    With results side by side, or as the first columns of a wider matrix.

    PyTorch has `addmm` onto float32 from 2.10 on, other builds have neither, and to ask by version or by name of the
    device would be to guess.
    """
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            left = torch.full((16, 32), 16.0, dtype=torch.bfloat16, device=device)
            left[0] = 17.0  # as a transposed operand: 15 · 16 + 17 = 257, one bit more than bfloat16 has
            out = torch.full((32, 8 if contiguous else 16), 0.5, device=device)[:, :8]
            _MIXED[product](out, left.t(), torch.ones(16, 8, dtype=torch.bfloat16, device=device))
            right = bool((out == (257.5 if product == "addmm" else 257.0)).all())
            refusal = None if right else "its results are wrong"
    except Exception as error:  # a backend may refuse in any way
        first_line, _, _ = str(error).partition("\n")
        refusal = f"{type(error).__name__}: {first_line}"
    if refusal is not None and device.type == "cuda":
        logger.warning(
            f"`torch.{product}` does not give float32 sums of bfloat16 operands on {device}, and what takes its place "
            f"is slower: {refusal}"
        )
    return Support(refusal)


def narrowed(weight: Tensor, operands: torch.dtype) -> Tensor:
    """`weight` rounded to the dtype of the operands, a copy of at most its own size; itself where that is wider."""
    return weight if operands.itemsize > weight.dtype.itemsize else weight.to(operands)


def _slices(weight: Tensor) -> list[tuple[int, int]]:
    step = max(1, _SLICE_ELEMENTS // max(1, weight.size(1)))
    return [(start, min(start + step, weight.size(0))) for start in range(0, weight.size(0), step)]


def _raised(weight: Tensor, start: int, end: int, operands: torch.dtype, dtype: torch.dtype) -> Tensor:
    return weight[start:end].to(operands).to(dtype)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norms `[V]` of the rows of `weight[V, H]`, in `dtype`."""
    norms = weight.new_empty(weight.size(0), dtype=dtype)
    for start, end in _slices(weight):
        torch.linalg.vector_norm(weight[start:end].to(dtype), dim=1, out=norms[start:end])
    return norms


def project(out: Tensor, hidden: Tensor, weight: Tensor, operands: torch.dtype) -> None:
    """`out[n, V] = hidden[n, H] @ weight[V, H].T`."""
    if weight.dtype == operands == out.dtype:
        torch.mm(hidden.to(operands), weight.t(), out=out)
    elif mixed_gemm_supported("mm", operands, out):
        _mm(out, hidden.to(operands), weight.to(operands).t())
    else:
        hidden = hidden.to(operands).to(out.dtype)
        for start, end in _slices(weight):
            torch.mm(hidden, _raised(weight, start, end, operands, out.dtype).t(), out=out[:, start:end])


def backproject(out: Tensor, grad_logits: Tensor, weight: Tensor, operands: torch.dtype) -> None:
    """`out[n, H] = grad_logits[n, V] @ weight[V, H]`."""
    if weight.dtype == operands == out.dtype:
        torch.mm(grad_logits, weight, out=out)
    elif mixed_gemm_supported("mm", operands, out):
        _mm(out, grad_logits.to(operands), weight.to(operands))
    else:
        out.zero_()
        for start, end in _slices(weight):
            out.addmm_(grad_logits[:, start:end], _raised(weight, start, end, operands, out.dtype))


def accumulate_weight(out: Tensor, grad_logits: Tensor, hidden: Tensor, operands: torch.dtype) -> None:
    """`out[V, H] += grad_logits[n, V].T @ hidden[n, H]`."""
    if mixed_gemm_supported("addmm", operands, out):
        _addmm(out, grad_logits.to(operands).t(), hidden.to(operands))
    elif mixed_gemm_supported("mm", operands, out):
        hidden = hidden.to(operands)
        for start, end in _slices(out):
            part = torch.empty_like(out[start:end])
            _mm(part, grad_logits[:, start:end].to(operands).t(), hidden)
            out[start:end] += part
    else:
        out.addmm_(grad_logits.t(), hidden.to(operands).to(out.dtype))


def gather_rows_(matrix: Tensor, rows: Tensor) -> Tensor:
    """Move ascending `rows[m]` of `matrix[n, V]` to its front, in place, and return these `m` rows as a view.

    An eighth of them at a time is held beside the matrix.
    """
    step = max(1, -(-len(rows) // 8))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        # Ascending rows stand at or behind where they go, so what is overwritten has been moved already.
        matrix[start : start + len(part)] = matrix[part]
    return matrix[: len(rows)]
