"""Triton: the gradient of a target, written over the policy's logits."""

import triton
import triton.language as tl

from .fold import MIXTURE_LOG_SUM, POLICY_LOG_SUM, POLICY_MAX, PRIOR_MAX, exp


# Rows of the coefficients, `[COEFFICIENTS, n]`.
OF_POLICY = tl.constexpr(0)
OF_MIXTURE = tl.constexpr(1)
OF_LABEL = tl.constexpr(2)
COEFFICIENTS = 3


@triton.jit
def must_wait(step):
    """Whether all threads of a program have to meet before one of them writes half as wide over what was read.

    A step overwrites what was read in the step of half its number. So a meeting in step b is enough for the steps b to
    2b + 1: only steps 0, 2, 6, 14, ... wait, and in the others loads and stores overlap.
    """
    return (step + 2) & (step + 1) == 0


@triton.jit(do_not_specialize=["folded_stride", "coefficients_stride"], do_not_specialize_on_alignment=["labels_ptr"])
def gradient_kernel(
    out_ptr,
    policy_ptr,
    prior_ptr,
    added_ptr,
    labels_ptr,
    folded_ptr,
    coefficients_ptr,
    vocabulary,
    out_stride,
    policy_stride,
    prior_stride,
    added_stride,
    folded_stride,
    coefficients_stride,
    FLOOR: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out = c_p p + c_m softmax(A z + B t) + added + c_y δ(y)`, times the slope of a soft-cap if there is one.

    One program per row. `out` may be the memory of `policy`, in the same dtype or one of half its width.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)  # one without a column has a maximum of NaN, and so a gradient of NaN
    folded = folded_ptr + row
    coefficients = coefficients_ptr + row
    z_max = tl.load(folded + POLICY_MAX * folded_stride)
    z_log_sum = tl.load(folded + POLICY_LOG_SUM * folded_stride)
    of_policy = tl.load(coefficients + OF_POLICY * coefficients_stride)
    of_label = tl.load(coefficients + OF_LABEL * coefficients_stride)
    if HAS_MIXTURE:
        m_log_sum = tl.load(folded + MIXTURE_LOG_SUM * folded_stride)
        of_mixture = tl.load(coefficients + OF_MIXTURE * coefficients_stride)
        if HAS_PRIOR:
            t_max = tl.load(folded + PRIOR_MAX * folded_stride)

    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        inside = columns < vocabulary
        z = tl.load(policy_ptr + row * policy_stride + columns, mask=inside, other=0.0)
        z = tl.where(z < FLOOR, FLOOR, z)
        value = of_policy * exp(z - z_max - z_log_sum)
        if HAS_MIXTURE:
            m = A * (z - z_max)
            if HAS_PRIOR:
                t = tl.load(prior_ptr + row * prior_stride + columns, mask=inside, other=0.0)
                t = tl.where(t < FLOOR, FLOOR, t)
                m += B * (t - t_max)
            value += of_mixture * exp(m - m_log_sum)
        if HAS_ADDED:
            value += tl.load(added_ptr + row * added_stride + columns, mask=inside, other=0.0)
        value = tl.where(columns == label, value + of_label, value)
        if SOFTCAP > 0:
            ratio = z / SOFTCAP
            value *= 1.0 - ratio * ratio  # the slope of softcap · tanh(x / softcap), from its result
        if out_ptr.dtype.element_ty != policy_ptr.dtype.element_ty:
            if must_wait(start // BLOCK):
                tl.debug_barrier()
        tl.store(out_ptr + row * out_stride + columns, value.to(out_ptr.dtype.element_ty), mask=inside)
