"""The Triton kernel: statistics and gradient of whole chunks, in one pass each over the logits.

It has no formula of its own. Trusts, residuals, scales and values are the functions that the plain kernel calls; here
they get a tile whose statistics were folded on the device, and whose `[n, V]` tensors are only made if one of them, as
a user's own may, asks for such a tensor.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...gemm import Head, gather_rows_, mixed_gemm_supported
from ...target.embeddings import Embeddings
from ...target.objective import Objective
from ...target.tile import SMALLEST_SHARE, floor_of
from ...target.token_target import TokenTarget, parts_of
from . import fold, gradient
from .folded_tile import POLICY, Asked, FoldedMeasure, FoldedRest, FoldedTile, Shares


# The largest share of a mixture that is folded: beyond it, `share · floor` would overflow. Below the smallest one it
# would be no longer a probability of zero.
_LARGEST_SHARE = 1024.0
# Columns of float32 logits that a program works on at a time, and bytes of them per thread: enough loads at once to
# hide the way from memory, and what a thread keeps still fits its registers.
_BLOCK, _BYTES_PER_THREAD = 4096, 64
# Columns of a lane in one step. What a lane keeps is brought up to date once for all of them, not for each.
_GROUP = 4
# Two programs of 256 such threads fill a processor's 65536 registers, and wait for memory in turns.
_REGISTERS = 128


class _Asked(Exception):
    """A residual asked for more than a mixture."""


class _Recorder:
    """Stands for a tile, to learn which mixture a residual makes; asked for anything else, it ends the search."""

    def __init__(self, prior_is_policy: bool):
        self.prior_is_policy = prior_is_policy
        self.policy = POLICY

    def mixture(self, policy: float = 0.0, prior: float = 0.0) -> Shares:
        return self._shares(policy, prior, False)

    def spared(self, policy: float = 0.0, prior: float = 0.0) -> Shares:
        return self._shares(policy, prior, True)

    def _shares(self, policy: float, prior: float, spared: bool) -> Shares:
        policy, prior = (policy + prior, 0.0) if self.prior_is_policy else (policy, prior)
        return Shares(float(policy), float(prior), spared)

    def __getattr__(self, name: str) -> Any:
        raise _Asked(name)


class Made(NamedTuple):
    """What a residual makes beside the policy: one mixture or none, and whether the policy without the label too."""

    mixture: Shares | None
    spared: bool


def made_by(objective: Objective) -> Made | None:
    """What a residual makes, if all of it is folded; None for other residuals.

    None costs nothing but speed: what a residual then asks of its tile is computed by torch operations.
    """
    try:
        found = objective.residual(_Recorder(not objective.uses_prior), objective.knobs)
    except Exception:  # a user's function may do anything with what it is given
        return None
    measures = {part.measure for part in parts_of(found)} - {POLICY}
    spared = any(measure.spared for measure in measures)
    mixtures = measures - {POLICY._replace(spared=True)}
    if len(mixtures) > 1 or any(each.spared != spared for each in mixtures):
        return None
    mixture = next(iter(mixtures), None)
    shares = () if mixture is None else (mixture.policy, mixture.prior)
    foldable = all(share == 0 or SMALLEST_SHARE <= share <= _LARGEST_SHARE for share in shares)
    return Made(mixture, spared) if foldable else None


class FoldingKernel:
    """Statistics and gradient by Triton kernels, a whole chunk at a time."""

    name = "triton"

    def __init__(self, objective: Objective):
        made = made_by(objective)
        self.looks_up = made is None
        self.shares, spared = made or Made(None, False)
        # A trust that reads the prior reads its log-probability of the label.
        reads_prior = objective.trust.uses_prior or objective.scale.uses_prior
        self.asked = Asked(reads_prior, objective.statistics, spared)
        # What such a design keeps leaves no room for as many columns at a time.
        crowded = spared and self.shares is not None and bool(objective.statistics)
        self.group = _GROUP // 2 if crowded else _GROUP

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
        policy_share, prior_share, _ = self.shares or Shares(0.0, 0.0)
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
                    SPARED=self.asked.spared,
                    HAS_PRIOR_BELOW="prior_mass_below" in self.asked.statistics and prior_logits is not None,
                    GROUP=self.group,
                    **_launch(logits, self.group),
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
        terms, of_label = target.gradient
        factor = factor * scale
        coefficients = torch.zeros_like(tile.folded[: gradient.COEFFICIENTS])
        coefficients[gradient.OF_LABEL.value] = factor * of_label
        added = None
        for measure, coefficient in terms:
            if measure is tile.policy:
                coefficients[gradient.OF_POLICY.value] = factor * coefficient
            elif isinstance(measure, FoldedRest):
                coefficients[gradient.OF_REST.value] = factor * coefficient
            elif isinstance(measure, FoldedMeasure):
                coefficients[gradient.OF_MIXTURE.value] = factor * coefficient
            else:
                part = measure.probs * (factor * coefficient)[:, None]
                added = part if added is None else added.add_(part)
        logits, prior = tile.logits, tile.given_prior
        policy_share, prior_share, _ = self.shares or Shares(0.0, 0.0)
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
                SPARED=self.asked.spared,
                A=policy_share,
                B=prior_share,
                SOFTCAP=softcap,
                **_launch(logits),
            )
        # All are written where they stand, and moved together: one thread block must not write what another reads.
        return len(out if rows is None else gather_rows_(out, rows))


def _launch(logits: Tensor, group: int = _GROUP) -> dict[str, int | bool]:
    """How a kernel is started; with a smaller `group`, as many lanes take fewer columns in a step."""
    size = logits.element_size()
    block = min(_BLOCK * 4 // size, triton.next_power_of_2(logits.size(1)))
    # All threads side by side along the lanes of a step, so that what a lane keeps is in the registers of one thread.
    warps = block * size // (_BYTES_PER_THREAD * (64 if torch.version.hip else 32))
    # Fused multiply-adds save instructions; from Triton 3.10 on they have to be asked for.
    options = {"BLOCK": max(_GROUP, block) // _GROUP * group, "num_warps": max(1, warps), "enable_fp_fusion": True}
    if size <= 4 and not torch.version.hip:
        options["maxnreg"] = _REGISTERS
    return options
