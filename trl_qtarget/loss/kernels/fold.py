"""Triton: every statistic of a row of logits in one pass, as many of policy, prior and mixture as are asked for.

A mixture is `softmax(A z + B t)` of the policy's logits `z` and the prior's `t`, over all columns or, `SPARED`, all
but the label's. Which one a target has is known to its residual alone (`Tile.mixture`, `Tile.spared`); here are only
the sums from which `folded_tile.py` makes the statistics of any.
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
MIXTURE_LOG_SUM = tl.constexpr(9)  # log Σ exp(A (z - max) + B (t - max)); `SPARED`: of z the maximum of the others
MIXTURE_POLICY_MEAN = tl.constexpr(10)  # mean of z - max under the mixture
MIXTURE_PRIOR_MEAN = tl.constexpr(11)  # mean of t - max under the mixture
# Only where a design asks for them.
RANK = tl.constexpr(12)  # number of columns whose z is at least the label's
RIVAL = tl.constexpr(13)  # largest z but for the label's
COLLISION = tl.constexpr(14)  # Σ p²
PRIOR_BELOW = tl.constexpr(15)  # prior mass of the columns whose t is below the label's
REST_MAX = tl.constexpr(16)  # largest z but for the label's, NaN where there is none
REST_LOG_SUM = tl.constexpr(17)  # log Σ exp(z - max) without the label
ROWS = 18


@triton.jit
def exp(x):
    """`tl.exp` without its three instructions more that keep results below 1e-38."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def is_first(row_ptr, label, label_value, top, before, offsets, BLOCK: tl.constexpr, FLOOR: tl.constexpr):
    """Whether the label has the largest value, `top`, and no column before it has that too, as `argmax` counts.

    `before` are the lanes' maxima over the steps before the label's; of its own step, all is read once more.
    """
    columns = label // BLOCK * BLOCK + offsets
    values = tl.load(row_ptr + columns, mask=columns < label, other=FLOOR)
    earlier = tl.maximum(tl.max(before, 0), tl.max(tl.max(values, 0), 0))
    return (label_value >= top) & (label_value > earlier)


# What depends on the number of tokens and on where a chunk begins must not cost a compilation for each.
@triton.jit(do_not_specialize=["out_stride"], do_not_specialize_on_alignment=["labels_ptr"])
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
    EMPTY: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    PRIOR_SUM: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_RIVAL: tl.constexpr,
    HAS_COLLISION: tl.constexpr,
    HAS_PRIOR_BELOW: tl.constexpr,
    SPARED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program per row. Every lane folds its own columns, `GROUP` in a step; the lanes are joined once, at the end.

    `FLOOR` stands for a probability of zero, as in `tile.finite`. All `-inf` become `FLOOR`, and so does what lies
    beyond the last column; NaN stays what it is: a maximum passes it over, the sums do not. All of a row is NaN where
    it is no distribution, having no logit above `FLOOR` (of a mixture: `EMPTY`), or no column for its label.
    """
    row = tl.program_id(0).to(tl.int64)
    policy_row = policy_ptr + row * policy_stride
    prior_row = prior_ptr + row * prior_stride
    dtype = policy_ptr.dtype.element_ty
    LANES: tl.constexpr = BLOCK // GROUP
    MIXES_PRIOR: tl.constexpr = HAS_PRIOR and B > 0
    offsets = tl.arange(0, GROUP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < vocabulary)
    label = tl.where(known, label, vocabulary).to(tl.int32)  # so that nothing outside the row is read
    zeros = tl.zeros([LANES], dtype)

    z_max, z_sum, z_mean, z_before = zeros + FLOOR, zeros, zeros, zeros + FLOOR
    if HAS_PRIOR:
        t_max, t_sum, t_before = zeros + FLOOR, zeros, zeros + FLOOR
    if HAS_MIXTURE:
        m_max, m_sum, m_policy, m_prior = zeros + FLOOR, zeros, zeros, zeros
    if HAS_RANK:
        rank = zeros
        bar = tl.load(policy_row + label, mask=known, other=FLOOR)
        bar = tl.where(bar < FLOOR, FLOOR, bar)
    if HAS_RIVAL:
        rival = zeros + FLOOR
    if HAS_COLLISION:
        z_square = zeros
    if HAS_PRIOR_BELOW:
        t_below = zeros
        t_bar = tl.load(prior_row + label, mask=known, other=FLOOR)
        t_bar = tl.where(t_bar < FLOOR, FLOOR, t_bar)

    for start in range(0, vocabulary, BLOCK):
        columns = start + offsets
        inside = columns < vocabulary
        z = tl.load(policy_row + columns, mask=inside, other=FLOOR)
        if HAS_PRIOR:
            t = tl.load(prior_row + columns, mask=inside, other=FLOOR)
        z = tl.where(z < FLOOR, FLOOR, z)
        if SPARED:
            # Put aside until the end: beside a label that has nearly all of the mass, the others would underflow.
            z = tl.where(columns == label, FLOOR, z)
        z_new = tl.maximum(z_max, tl.max(z, 0))
        z_before = tl.where(start + BLOCK <= label, z_new, z_before)
        z_step = z_new - z_max
        z_rest = z - z_new[None, :]
        shrink = exp(-z_step)
        weight = exp(z_rest)
        z_mean = shrink * (z_mean - z_step * z_sum) + tl.sum(weight * z_rest, 0)
        z_sum = shrink * z_sum + tl.sum(weight, 0)
        z_max = z_new
        if HAS_RANK:
            rank += tl.sum((inside & (z >= bar)).to(dtype), 0)
        if HAS_RIVAL:
            rival = tl.maximum(rival, tl.max(tl.where(columns == label, FLOOR, z), 0))
        if HAS_COLLISION:
            z_square = shrink * shrink * z_square + tl.sum(weight * weight, 0)
        if HAS_PRIOR:
            t = tl.where(t < FLOOR, FLOOR, t)
            t_new = tl.maximum(t_max, tl.max(t, 0))
            t_before = tl.where(start + BLOCK <= label, t_new, t_before)
            t_step = t_new - t_max
            t_rest = t - t_new[None, :]
            if PRIOR_SUM:
                t_sum = exp(-t_step) * t_sum + tl.sum(exp(t_rest), 0)
            if HAS_PRIOR_BELOW:
                t_below = exp(-t_step) * t_below + tl.sum(tl.where(t < t_bar, exp(t_rest), 0.0), 0)
            t_max = t_new
        if HAS_MIXTURE:
            # Measured from the maxima of `z` and `t`: when these move, so does all that was summed before.
            m = A * z_rest
            m_moved = m_max - A * z_step
            m_policy = m_policy - z_step * m_sum
            if MIXES_PRIOR:
                m += B * t_rest
                m_moved -= B * t_step
                m_prior = m_prior - t_step * m_sum
            # A uniform mixture gives every column the same weight, so those beyond the last are put aside here.
            m = tl.where(inside, tl.where(m < FLOOR, FLOOR, m), FLOOR)
            if SPARED:
                m = tl.where(columns == label, FLOOR, m)
            m_moved = tl.where(m_moved < FLOOR, FLOOR, m_moved)
            m_new = tl.maximum(m_moved, tl.max(m, 0))
            shrink = exp(m_moved - m_new)
            weight = exp(m - m_new[None, :])
            m_policy = shrink * m_policy + tl.sum(weight * z_rest, 0)
            if MIXES_PRIOR:
                m_prior = shrink * m_prior + tl.sum(weight * t_rest, 0)
            m_sum = shrink * m_sum + tl.sum(weight, 0)
            m_max = m_new

    out = out_ptr + row
    label_logit = tl.load(policy_row + label, mask=known, other=FLOOR)
    label_logit = tl.where(label_logit < FLOOR, FLOOR, label_logit)
    top = tl.max(z_max, 0)
    z_top = tl.maximum(top, label_logit) if SPARED else top
    z_top = tl.where(known & (z_top > FLOOR), z_top, float("nan"))
    top = tl.where(known & (top > FLOOR), top, float("nan"))
    z_step = top - z_max
    shrink = exp(-z_step)
    total = tl.sum(shrink * z_sum, 0)
    mean = tl.sum(shrink * (z_mean - z_step * z_sum), 0)
    if HAS_COLLISION:
        square = tl.sum(shrink * shrink * z_square, 0)
    if SPARED:
        tl.store(out + REST_MAX * out_stride, top)
        tl.store(out + REST_LOG_SUM * out_stride, tl.log(total))
        # The label comes back to the others, of which there may be none.
        alone = (top != top) & (label_logit == label_logit)
        lift, own = top - z_top, exp(label_logit - z_top)
        mean = exp(lift) * (mean + lift * total)
        mean = tl.where(alone, 0.0, mean) + own * (label_logit - z_top)
        if HAS_COLLISION:
            square = tl.where(alone, 0.0, exp(lift) * exp(lift) * square) + own * own
        total = tl.where(alone, 0.0, exp(lift) * total) + own
    first = is_first(policy_row, label, label_logit, z_top, z_before, offsets, BLOCK, FLOOR)
    tl.store(out + POLICY_MAX * out_stride, z_top)
    tl.store(out + POLICY_LOG_SUM * out_stride, tl.log(total))
    tl.store(out + POLICY_MEAN * out_stride, mean / total)
    tl.store(out + LABEL_LOGIT * out_stride, label_logit)
    if HAS_RANK:
        own_rank = tl.where(SPARED & (label_logit > FLOOR), 1.0, 0.0)  # among zeros it has been counted
        tl.store(out + RANK * out_stride, tl.sum(rank, 0) + own_rank)
    if HAS_RIVAL:
        tl.store(out + RIVAL * out_stride, tl.max(rival, 0))
    if HAS_COLLISION:
        tl.store(out + COLLISION * out_stride, square / (total * total))
    tl.store(out + IS_TOP1 * out_stride, (first & (total == total)).to(dtype))  # a NaN that is not the label's
    if HAS_PRIOR:
        t_top = tl.max(t_max, 0)
        t_top = tl.where(known & (t_top > FLOOR), t_top, float("nan"))
        t_step = t_top - t_max
        prior_logit = tl.load(prior_row + label, mask=known, other=FLOOR)
        prior_logit = tl.where(prior_logit < FLOOR, FLOOR, prior_logit)
        first = is_first(prior_row, label, prior_logit, t_top, t_before, offsets, BLOCK, FLOOR)
        tl.store(out + PRIOR_MAX * out_stride, t_top)
        if PRIOR_SUM:
            t_total = tl.sum(exp(-t_step) * t_sum, 0)
            tl.store(out + PRIOR_LOG_SUM * out_stride, tl.log(t_total))
            if HAS_PRIOR_BELOW:
                tl.store(out + PRIOR_BELOW * out_stride, tl.sum(exp(-t_step) * t_below, 0) / t_total)
        tl.store(out + PRIOR_LABEL_LOGIT * out_stride, prior_logit)
        tl.store(out + PRIOR_IS_TOP1 * out_stride, first.to(dtype))
    if HAS_MIXTURE:
        m_moved = m_max - A * z_step
        m_policy = m_policy - z_step * m_sum
        if MIXES_PRIOR:
            m_moved -= B * t_step
            m_prior = m_prior - t_step * m_sum
        m_top = tl.max(m_moved, 0)
        m_top = tl.where(m_top > EMPTY, m_top, float("nan"))
        shrink = exp(m_moved - m_top)
        total = tl.sum(shrink * m_sum, 0)
        tl.store(out + MIXTURE_LOG_SUM * out_stride, m_top + tl.log(total))
        tl.store(out + MIXTURE_POLICY_MEAN * out_stride, tl.sum(shrink * m_policy, 0) / total)
        if MIXES_PRIOR:
            tl.store(out + MIXTURE_PRIOR_MEAN * out_stride, tl.sum(shrink * m_prior, 0) / total)
