"""The plain kernel: torch operations on blocks of a chunk, on any device."""

from functools import cache

import torch
from torch import Tensor

from ...gemm import Head
from ...target.embeddings import Embeddings
from ...target.objective import Objective
from ...target.tile import Tile, finite, log_softmax_and_probs, margin_of, odds_below, rank_of
from ...target.token_target import TokenTarget


# Logits worked on at a time between two products. On a CPU this block stays in the cache through all passes over it.
# An accelerator has no such cache, but what a pass makes anew (probabilities, a residual) is as large as the block,
# and several of those live at once: with a quarter of a chunk, 64 MiB in float32, they add about one chunk and not
# several, and a kernel on it still takes longer than its launch.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
DEFAULT_BLOCK_ELEMENTS = 1 << 24
# The largest piece that glibc learns from: freed once, pieces up to it are kept, and twice as much at the heap's end.
_LARGEST_KEPT = (1 << 25) - (1 << 13)


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep what a block frees, for the next one.

    glibc gives the end of its heap back when more is free there than twice the largest piece it has ever mapped and
    seen freed. In a process where those were small, each block's memory would be returned, and faulted in anew page
    by page by the next: a tenth of the loss with a reference. Nothing is written to this piece, so it takes no memory.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


class PlainKernel:
    """Statistics and gradient by torch operations, block by block, over the chunk's own logits."""

    name = "torch"

    def __init__(self, objective: Objective):
        self.statistics = objective.statistics

    def block_tokens(self, vocabulary: int, device: torch.device) -> int:
        """Tokens of a block."""
        if device.type == "cpu":
            _keep_freed_memory()
        return max(1, BLOCK_ELEMENTS.get(device.type, DEFAULT_BLOCK_ELEMENTS) // vocabulary)

    def gradient_of(self, logits: Tensor, operands: torch.dtype) -> Tensor:
        """Where the gradient over a chunk's `logits[n, V]` goes, for products with operands of this dtype."""
        return logits

    def slope(self, head: Head, logits: Tensor) -> Tensor | float:
        """What `write_gradient` multiplies by; asked for before `tile` overwrites the logits."""
        return head.slope(logits)

    def tile(
        self,
        logits: Tensor,
        labels: Tensor,
        prior_logits: Tensor | None,
        token_weights: Tensor | None,
        embeddings: Embeddings,
    ) -> Tile:
        """The tile of a block of `logits[n, V]`, over which its log-probabilities are written."""
        # What compares logits does it before.
        compared = {}
        if "rank" in self.statistics:
            compared["rank"] = rank_of(logits, labels)
        if "margin" in self.statistics:
            compared["margin"] = margin_of(logits, labels)
        below = "prior_mass_below" in self.statistics and prior_logits is not None
        odds = odds_below(finite(prior_logits, in_place=True), labels) if below else None
        log_probs, probs, log_sum = log_softmax_and_probs(logits)
        tile = Tile(
            log_probs=finite(log_probs, in_place=True),
            labels=labels,
            prior_logits=None if prior_logits is None else finite(prior_logits, in_place=True),
            token_weights=token_weights,
            output_embeddings=embeddings,
            reuse_buffers=True,
            log_sum=log_sum,
        )
        if below:
            compared["prior_mass_below"] = odds * tile.prior_label_log_probs.exp()
        # As if they had been asked for already.
        vars(tile).update(compared)
        vars(tile.policy)["probs"] = probs
        return tile

    def write_gradient(
        self, out: Tensor, target: TokenTarget, factor: Tensor, slope: Tensor | float, rows: Tensor | None = None
    ) -> int:
        """`factor · s (p - Q) · slope`, over the log-probabilities of the policy, into the first rows of `out[n, V]`.

        Of the tokens in `rows[m]`, ascending, or of all. Returns how many rows were written.
        """
        terms, of_label = target.gradient
        labels = target.tile.labels
        pairs = [(measure.probs, (factor * value)[:, None]) for measure, value in terms]
        of_label = factor * of_label
        if rows is not None:
            pairs = [(probs[rows], coefficient[rows]) for probs, coefficient in pairs]
            labels, of_label, out = labels[rows], of_label[rows], out[: len(rows)]
            slope = slope[rows] if isinstance(slope, Tensor) else slope
        (first, coefficient), *rest = pairs
        torch.mul(first, coefficient, out=out)
        for probs, coefficient in rest:
            out.addcmul_(probs, coefficient)
        out.scatter_add_(1, labels[:, None], of_label[:, None])
        if isinstance(slope, Tensor) or slope != 1.0:
            out.mul_(slope)
        return len(out)
