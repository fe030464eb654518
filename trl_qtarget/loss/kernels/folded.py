"""The Triton kernel: statistics and gradient of whole chunks, in one pass each over the logits.

It has no formula of its own. Trusts, residuals, scales and values are the functions that the plain kernel calls; here
they get a tile whose statistics were folded on the device, and whose `[n, V]` tensors are only made if one of them, as
a user's own may, asks for such a tensor.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gemm import Head, gather_rows_, mixed_gemm_supported
from ...target.objective import Objective
from ...target.tile import (
    SMALLEST_SHARE,
    Embeddings,
    Measure,
    Tile,
    entropy_of,
    finite,
    floor_of,
    mixed,
    top_values,
)
from ...target.token_target import TokenTarget, parts_of
from . import fold, gradient


# The largest share of a mixture that is folded: beyond it, `share · floor` would overflow. Below the smallest one it
# would be no longer a probability of zero.
_LARGEST_SHARE = 1024.0
# Columns of float32 logits that a program works on at a time, and bytes of them per thread: enough loads at once to
# hide the way from memory, and what a thread keeps still fits its registers.
_BLOCK, _BYTES_PER_THREAD = 4096, 64


class Asked(NamedTuple):
    """What is folded beside what every target needs: the prior's sum, and statistics of a tile by name."""

    prior_sum: bool
    statistics: frozenset[str]


class FoldedMeasure(Measure):
    """A mixture `softmax(policy · z + prior · t)` of which the statistics are known, and the tensor only if asked."""

    def __init__(self, tile: "FoldedTile", policy: float, prior: float):
        self.tile, self.shares, self.labels = tile, (policy, prior), tile.labels

    @property
    def policy_log_probs(self) -> Tensor:
        return self.tile.log_probs

    @cached_property
    def log_probs(self) -> Tensor:
        policy, prior = self.shares
        if (policy, prior) == (1.0, 0.0):
            return self.tile.log_probs
        return mixed(self.tile.log_probs, self.tile.prior_logits, policy, prior)

    @cached_property
    def label_log_probs(self) -> Tensor:
        tile, (policy, prior) = self.tile, self.shares
        label = policy * (tile.row(fold.LABEL_LOGIT) - tile.row(fold.POLICY_MAX))
        if prior:
            label = label + prior * (tile.row(fold.PRIOR_LABEL_LOGIT) - tile.row(fold.PRIOR_MAX))
        return label - tile.row(fold.MIXTURE_LOG_SUM)

    @cached_property
    def entropy(self) -> Tensor:
        row, (policy, prior) = self.tile.row, self.shares
        mean = policy * row(fold.MIXTURE_POLICY_MEAN)
        if prior:
            mean = mean + prior * row(fold.MIXTURE_PRIOR_MEAN)
        return row(fold.MIXTURE_LOG_SUM) - mean

    @cached_property
    def cross_entropy(self) -> Tensor:
        return self.tile.row(fold.POLICY_LOG_SUM) - self.tile.row(fold.MIXTURE_POLICY_MEAN)


class FoldedPolicy(FoldedMeasure):
    """The policy itself."""

    def __init__(self, tile: "FoldedTile"):
        super().__init__(tile, 1.0, 0.0)

    @property
    def label_log_probs(self) -> Tensor:
        return self.tile.label_log_probs

    @cached_property
    def entropy(self) -> Tensor:
        return self.tile.row(fold.POLICY_LOG_SUM) - self.tile.row(fold.POLICY_MEAN)

    @property
    def cross_entropy(self) -> Tensor:
        return self.entropy


class FoldedTile(Tile):
    """A tile whose statistics come from the fold. `log_probs`, `probs` and the like are made when asked for."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        prior_logits: Tensor | None,
        token_weights: Tensor | None,
        embeddings: Embeddings,
        folded: Tensor,
        shares: tuple[float, float] | None,
        asked: Asked,
    ):
        self.logits, self.labels, self.given_prior = logits, labels, prior_logits
        self.token_weights, self.output_embeddings = token_weights, embeddings
        self.folded, self.shares, self.asked = folded, shares, asked
        self.reuse_buffers = False

    def row(self, which: tl.constexpr) -> Tensor:
        """One of the folded statistics, `[n]`."""
        return self.folded[which.value]

    @cached_property
    def log_probs(self) -> Tensor:
        return finite(torch.log_softmax(self.logits, dim=-1), in_place=True)

    @cached_property
    def prior_logits(self) -> Tensor:
        return self.log_probs if self.given_prior is None else finite(self.given_prior)

    @cached_property
    def policy(self) -> Measure:
        return FoldedPolicy(self)

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Measure:
        if self.given_prior is None:
            policy, prior = policy + prior, 0.0
        if (policy, prior) == (1.0, 0.0):
            return self.policy
        if (policy, prior) == self.shares:
            return self._mixture
        return super().mixture(policy, prior)

    @cached_property
    def _mixture(self) -> FoldedMeasure:
        return FoldedMeasure(self, *self.shares)

    @cached_property
    def label_log_probs(self) -> Tensor:
        row = self.row
        return row(fold.LABEL_LOGIT) - row(fold.POLICY_MAX) - row(fold.POLICY_LOG_SUM)

    @cached_property
    def prior_label_log_probs(self) -> Tensor:
        if self.given_prior is None:
            return self.label_log_probs
        if not self.asked.prior_sum:
            return self.prior_log_probs.gather(1, self.labels[:, None]).squeeze(1)
        row = self.row
        return row(fold.PRIOR_LABEL_LOGIT) - row(fold.PRIOR_MAX) - row(fold.PRIOR_LOG_SUM)

    @property
    def is_top1(self) -> Tensor:
        return self.row(fold.IS_TOP1)

    @property
    def prior_is_top1(self) -> Tensor:
        return self.row(fold.IS_TOP1 if self.given_prior is None else fold.PRIOR_IS_TOP1)

    @cached_property
    def rank(self) -> Tensor:
        return self.row(fold.RANK) if "rank" in self.asked.statistics else super().rank

    @cached_property
    def margin(self) -> Tensor:
        if "margin" in self.asked.statistics:
            return self.row(fold.LABEL_LOGIT) - self.row(fold.RIVAL)
        return super().margin

    @cached_property
    def collision(self) -> Tensor:
        return self.row(fold.COLLISION) if "collision" in self.asked.statistics else super().collision

    @property
    def largest_prob(self) -> Tensor:
        return (-self.row(fold.POLICY_LOG_SUM)).exp()

    @cached_property
    def prior_mass_below(self) -> Tensor:
        if "prior_mass_below" in self.asked.statistics and self.given_prior is not None:
            return self.row(fold.PRIOR_BELOW)
        return super().prior_mass_below

    def top_k_entropy(self, k: int) -> Tensor:
        k = min(k, self.logits.size(-1))
        return entropy_of(finite(top_values(self.logits, k))) / math.log(max(k, 2))


class _Asked(Exception):
    """A residual asked for more than a mixture."""


class _Recorder:
    """Stands for a tile, to learn which mixture a residual makes; asked for anything else, it ends the search."""

    def __init__(self, prior_is_policy: bool):
        self.prior_is_policy = prior_is_policy
        self.policy = (1.0, 0.0)

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> tuple[float, float]:
        shares = (policy + prior, 0.0) if self.prior_is_policy else (policy, prior)
        return tuple(map(float, shares))

    def __getattr__(self, name: str) -> Any:
        raise _Asked(name)


def mixture_of(objective: Objective) -> tuple[float, float] | None:
    """Shares of policy and prior in the one mixture beside the policy that a residual makes; None for other residuals.

    None costs nothing but speed: what a residual then asks of its tile is computed by torch operations.
    """
    try:
        found = objective.residual(_Recorder(not objective.uses_prior), objective.knobs)
    except Exception:  # a user's function may do anything with what it is given
        return None
    shares = {part.measure for part in parts_of(found)} - {(1.0, 0.0)}
    if len(shares) != 1:
        return None
    (policy, prior) = shares.pop()
    foldable = all(share == 0 or SMALLEST_SHARE <= share <= _LARGEST_SHARE for share in (policy, prior))
    return (policy, prior) if foldable else None


class FoldingKernel:
    """Statistics and gradient by Triton kernels, a whole chunk at a time."""

    name = "triton"

    def __init__(self, objective: Objective):
        self.shares = mixture_of(objective)
        self.looks_up = self.shares is None and objective.residual.name != "policy"
        # A trust that reads the prior reads its log-probability of the label.
        self.asked = Asked(objective.trust.uses_prior or objective.scale.uses_prior, objective.statistics)

    def block_tokens(self, vocabulary: int, device: torch.device) -> int:
        """Any number of tokens: nothing of the vocabulary's size is made between the passes."""
        return 1 << 30

    def gradient_of(self, logits: Tensor, operands: torch.dtype) -> Tensor:
        """Where the gradient over `logits[n, V]` goes: into their memory, in the dtype that the products take."""
        # The barrier of an AMD GPU does not wait for what was asked of memory before it, and in the same memory the
        # narrower gradient of one thread overwrites logits of another.
        if torch.version.hip or not mixed_gemm_supported("mm", operands, logits):
            return logits
        return logits.view(operands)[:, : logits.size(1)]

    def slope(self, head: Head, logits: Tensor) -> tuple[float, float]:
        """Scale and soft-cap; the kernel takes the slope of the cap from the logits."""
        return head.logit_scale, head.logit_softcap or 0.0

    def tile(
        self,
        logits: Tensor,
        labels: Tensor,
        prior_logits: Tensor | None,
        token_weights: Tensor | None,
        embeddings: Embeddings,
    ) -> FoldedTile:
        """The tile of `logits[n, V]`, which stay as they are."""
        folded = logits.new_zeros(fold.ROWS, len(logits))
        prior = logits if prior_logits is None else prior_logits
        policy_share, prior_share = self.shares or (0.0, 0.0)
        floor = floor_of(logits.dtype)
        if len(logits):
            with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
                fold.fold_kernel[(len(logits),)](
                    logits,
                    prior,
                    labels,
                    folded,
                    logits.size(1),
                    logits.stride(0),
                    prior.stride(0),
                    folded.stride(0),
                    FLOOR=floor,
                    EMPTY=floor / 2 * min([share for share in (policy_share, prior_share, 1.0) if share]),
                    HAS_PRIOR=prior_logits is not None,
                    PRIOR_SUM=self.asked.prior_sum,
                    HAS_MIXTURE=self.shares is not None,
                    A=policy_share,
                    B=prior_share,
                    HAS_RANK="rank" in self.asked.statistics,
                    HAS_RIVAL="margin" in self.asked.statistics,
                    HAS_COLLISION="collision" in self.asked.statistics,
                    HAS_PRIOR_BELOW="prior_mass_below" in self.asked.statistics and prior_logits is not None,
                    **_launch(logits),
                )
        # What is not folded looks for the label's column; a row of another label is NaN from its maximum on.
        inside = labels.clamp(0, logits.size(1) - 1) if self.looks_up else labels
        return FoldedTile(logits, inside, prior_logits, token_weights, embeddings, folded, self.shares, self.asked)

    def write_gradient(
        self,
        out: Tensor,
        target: TokenTarget,
        factor: Tensor,
        slope: tuple[float, float],
        rows: Tensor | None = None,
    ) -> int:
        """`factor · s (p - Q) · slope` into the first rows of `out[n, V]`, which may be the memory of the logits.

        Of the tokens in `rows[m]`, ascending, or of all. Returns how many rows were written.
        """
        tile, (scale, softcap) = target.tile, slope
        terms, of_label = target.gradient()
        factor = factor * scale
        coefficients = torch.zeros_like(tile.folded[: gradient.COEFFICIENTS])
        coefficients[gradient.OF_LABEL.value] = factor * of_label
        added = None
        for measure, coefficient in terms:
            if measure is tile.policy:
                coefficients[gradient.OF_POLICY.value] = factor * coefficient
            elif isinstance(measure, FoldedMeasure):
                coefficients[gradient.OF_MIXTURE.value] = factor * coefficient
            else:
                part = measure.probs * (factor * coefficient)[:, None]
                added = part if added is None else added.add_(part)
        logits, prior = tile.logits, tile.given_prior
        policy_share, prior_share = self.shares or (0.0, 0.0)
        if not len(logits):
            return 0
        with torch.cuda.device_of(logits):
            gradient.gradient_kernel[(len(logits),)](
                out,
                logits,
                logits if prior is None else prior,
                logits if added is None else added,
                tile.labels,
                tile.folded,
                coefficients,
                logits.size(1),
                out.stride(0),
                logits.stride(0),
                0 if prior is None else prior.stride(0),
                0 if added is None else added.stride(0),
                tile.folded.stride(0),
                coefficients.stride(0),
                FLOOR=floor_of(logits.dtype),
                HAS_PRIOR=prior is not None and prior_share > 0,
                HAS_MIXTURE=self.shares is not None,
                HAS_ADDED=added is not None,
                A=policy_share,
                B=prior_share,
                SOFTCAP=softcap,
                **_launch(logits),
            )
        # All are written where they stand, and moved together: one thread block must not write what another reads.
        return len(out if rows is None else gather_rows_(out, rows))


def _launch(logits: Tensor) -> dict[str, int | bool]:
    size = logits.element_size()
    block = min(_BLOCK * 4 // size, triton.next_power_of_2(logits.size(1)))
    # All threads side by side along the lanes of a step, so that what a lane keeps is in the registers of one thread.
    warps = block * size // (_BYTES_PER_THREAD * (64 if torch.version.hip else 32))
    # Fused multiply-adds save instructions; from Triton 3.10 on they have to be asked for.
    return {"BLOCK": max(fold.GROUP.value, block), "num_warps": max(1, warps), "enable_fp_fusion": True}
