"""Triton: every statistic of a row of logits in one pass, as many of policy, prior and mixture as are asked for.

A mixture is `softmax(A z + B t)` of the policy's logits `z` and the prior's `t`. Which one a target has is known to
its residual alone (`Tile.mixture`); here are only the sums from which `folded.py` makes the statistics of any.
"""

import triton
import triton.language as tl


# Rows of the result, `[ROWS, n]`. All is measured from the maxima, so that no large numbers are subtracted.
POLICY_MAX = tl.constexpr(0)  # of z
POLICY_LOG_SUM = tl.constexpr(1)  # log Σ exp(z - max)
POLICY_MEAN = tl.constexpr(2)  # mean of z - max under the policy
LABEL_LOGIT = tl.constexpr(3)  # z of the label
IS_TOP1 = tl.constexpr(4)  # 1 where the label is the first of the largest
PRIOR_MAX = tl.constexpr(5)  # of t; the same of the prior
PRIOR_LOG_SUM = tl.constexpr(6)
PRIOR_LABEL_LOGIT = tl.constexpr(7)
PRIOR_IS_TOP1 = tl.constexpr(8)
MIXTURE_LOG_SUM = tl.constexpr(9)  # log Σ exp(A (z - max) + B (t - max))
MIXTURE_POLICY_MEAN = tl.constexpr(10)  # mean of z - max under the mixture
MIXTURE_PRIOR_MEAN = tl.constexpr(11)  # mean of t - max under the mixture
ROWS = 12


@triton.jit
def fold_kernel(
    policy_ptr,
    prior_ptr,
    labels_ptr,
    out_ptr,
    vocabulary,
    policy_stride,
    prior_stride,
    out_stride,
    FLOOR: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    PRIOR_SUM: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. Every lane folds its own columns; the lanes are joined once, at the end.

    `FLOOR` stands for a probability of zero, as in `tile.finite`. All `-inf` become `FLOOR`; NaN stays what it is.
    """
    row = tl.program_id(0).to(tl.int64)
    policy_row = policy_ptr + row * policy_stride
    prior_row = prior_ptr + row * prior_stride
    dtype = policy_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(policy_row + label)
    label_logit = tl.where(label_logit < FLOOR, FLOOR, label_logit)
    zeros = tl.zeros([BLOCK], dtype)

    z_max, z_sum, z_mean, beaten = zeros + FLOOR, zeros, zeros, tl.zeros([BLOCK], tl.int32)
    if HAS_PRIOR:
        prior_label_logit = tl.load(prior_row + label)
        prior_label_logit = tl.where(prior_label_logit < FLOOR, FLOOR, prior_label_logit)
        t_max, t_sum, prior_beaten = zeros + FLOOR, zeros, tl.zeros([BLOCK], tl.int32)
    if HAS_MIXTURE:
        m_max, m_sum, m_policy, m_prior = zeros + FLOOR, zeros, zeros, zeros

    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        inside = columns < vocabulary
        z = tl.load(policy_row + columns, mask=inside, other=FLOOR)
        z = tl.where(z < FLOOR, FLOOR, z)
        # Among equals the first is the favourite, as `argmax` has it.
        ahead = (z > label_logit) | ((z == label_logit) & (columns < label))
        beaten = beaten | (inside & ahead).to(tl.int32)
        z_new = tl.where(z > z_max, z, z_max)
        z_new = tl.where(z == z, z_new, z)
        z_step = z_new - z_max
        shrink = tl.exp(-z_step)
        weight = tl.where(inside, tl.exp(z - z_new), 0.0)
        z_mean = shrink * (z_mean - z_step * z_sum) + weight * (z - z_new)
        z_sum = shrink * z_sum + weight
        if HAS_PRIOR:
            t = tl.load(prior_row + columns, mask=inside, other=FLOOR)
            t = tl.where(t < FLOOR, FLOOR, t)
            prior_ahead = (t > prior_label_logit) | ((t == prior_label_logit) & (columns < label))
            prior_beaten = prior_beaten | (inside & prior_ahead).to(tl.int32)
            t_new = tl.where(t > t_max, t, t_max)
            t_new = tl.where(t == t, t_new, t)
            t_step = t_new - t_max
            if PRIOR_SUM:
                t_sum = tl.exp(-t_step) * t_sum + tl.where(inside, tl.exp(t - t_new), 0.0)
        if HAS_MIXTURE:
            # Measured from the maxima of `z` and `t`: when these move, so does all that was summed before.
            m = A * (z - z_new)
            m_moved = m_max - A * z_step
            m_policy = m_policy - z_step * m_sum
            if HAS_PRIOR:
                m += B * (t - t_new)
                m_moved -= B * t_step
                m_prior = m_prior - t_step * m_sum
            m = tl.where(inside, tl.where(m < FLOOR, FLOOR, m), FLOOR)
            m_moved = tl.where(m_moved < FLOOR, FLOOR, m_moved)
            m_new = tl.where(m > m_moved, m, m_moved)
            m_new = tl.where(m == m, m_new, m)
            shrink = tl.exp(m_moved - m_new)
            weight = tl.where(inside, tl.exp(m - m_new), 0.0)
            m_policy = shrink * m_policy + weight * (z - z_new)
            if HAS_PRIOR:
                m_prior = shrink * m_prior + weight * (t - t_new)
            m_sum = shrink * m_sum + weight
            m_max = m_new
        if HAS_PRIOR:
            t_max = t_new
        z_max = z_new

    out = out_ptr + row
    z_top = tl.max(z_max, 0)
    z_step = z_top - z_max
    shrink = tl.exp(-z_step)
    total = tl.sum(shrink * z_sum, 0)
    tl.store(out + POLICY_MAX * out_stride, z_top)
    tl.store(out + POLICY_LOG_SUM * out_stride, tl.log(total))
    tl.store(out + POLICY_MEAN * out_stride, tl.sum(shrink * (z_mean - z_step * z_sum), 0) / total)
    tl.store(out + LABEL_LOGIT * out_stride, label_logit)
    tl.store(out + IS_TOP1 * out_stride, 1 - tl.max(beaten, 0))
    if HAS_PRIOR:
        t_top = tl.max(t_max, 0)
        t_step = t_top - t_max
        tl.store(out + PRIOR_MAX * out_stride, t_top)
        if PRIOR_SUM:
            tl.store(out + PRIOR_LOG_SUM * out_stride, tl.log(tl.sum(tl.exp(-t_step) * t_sum, 0)))
        tl.store(out + PRIOR_LABEL_LOGIT * out_stride, prior_label_logit)
        tl.store(out + PRIOR_IS_TOP1 * out_stride, 1 - tl.max(prior_beaten, 0))
    if HAS_MIXTURE:
        m_moved = m_max - A * z_step
        m_policy = m_policy - z_step * m_sum
        if HAS_PRIOR:
            m_moved -= B * t_step
            m_prior = m_prior - t_step * m_sum
        m_top = tl.max(m_moved, 0)
        shrink = tl.exp(m_moved - m_top)
        total = tl.sum(shrink * m_sum, 0)
        tl.store(out + MIXTURE_LOG_SUM * out_stride, m_top + tl.log(total))
        tl.store(out + MIXTURE_POLICY_MEAN * out_stride, tl.sum(shrink * m_policy, 0) / total)
        if HAS_PRIOR:
            tl.store(out + MIXTURE_PRIOR_MEAN * out_stride, tl.sum(shrink * m_prior, 0) / total)
