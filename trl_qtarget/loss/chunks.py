"""The loop over chunks of tokens: logits, statistics, and at once the gradient, multiplied back.

Tokens are scored in chunks. While a chunk's logits are at hand, every statistic, the loss and the gradient
`s (p - Q)/num_items` are computed, the gradient over the logits in place, and multiplied back into the gradients of
the hidden states and of the head. So nothing is projected twice: 3 products of size N·V·H (2 with a frozen head), and
one more with a prior, but for a top-k prior.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import gemm
from ..gemm import Head
from ..target.embeddings import Embeddings
from ..target.objective import Objective
from ..target.tile import LabelStatistics, Tile
from ..target.token_target import TokenTarget
from ..target.top_k import TopKPrior
from .group import SequenceGroup
from .zeros import ZeroSearch


# Logits of a chunk, each of the policy's and the prior's: 256 MiB in float32. Large enough for full-speed products
# (hundreds of tokens at the largest vocabularies), small beside the rest of a training step.
_CHUNK_ELEMENTS = 1 << 26
# On CUDA, bytes of both together, at most and at least: 512 MiB, or a sixteenth of what is free where that is less.
# Each chunk reads and writes the float32 gradient of a trained head once, so a loss without a prior, which has the
# room, takes half as many.
MOST_CUDA_BYTES, _LEAST_CUDA_BYTES = 1 << 29, 1 << 26
_CUDA_SHARE = 16
STATISTICS = ("token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1", "prior_is_top1")


def chunk_elements(device: torch.device, dtype: torch.dtype, buffers: int) -> int:
    """Logits of a chunk in each of `buffers` tensors of this dtype."""
    if device.type != "cuda":
        return _CHUNK_ELEMENTS
    return _cuda_chunk_bytes(device) // (buffers * dtype.itemsize)


@cache
def _cuda_chunk_bytes(device: torch.device) -> int:
    """Bytes of all logits of a chunk, from what is free at the first call.

    A power of two, found once: the order of sums, and with it the last bits of a result, should not hang on the rest
    of the machine's memory.
    """
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = 1 << int(math.log2(max(1, free / _CUDA_SHARE)))
    return min(max(share, _LEAST_CUDA_BYTES), MOST_CUDA_BYTES)


class Kernel(Protocol):
    """What is done with logits between two products: `PlainKernel`, or `FoldingKernel` on a GPU.

    `TopKKernel`, around one of them, takes rows of a top-k prior in the place of the prior's logits.
    """

    name: str

    def block_tokens(self, vocabulary: int, device: torch.device) -> int: ...

    def gradient_of(self, logits: Tensor, operands: torch.dtype) -> Tensor: ...

    def slope(self, head: Head, logits: Tensor) -> Any: ...

    def tile(
        self,
        logits: Tensor,
        labels: Tensor,
        prior: Tensor | TopKPrior | None,
        token_weights: Tensor | None,
        embeddings: Embeddings,
    ) -> Tile: ...

    def write_gradient(
        self, out: Tensor, target: TokenTarget, factor: Tensor, slope: Any, rows: Tensor | None = None
    ) -> int: ...


@dataclass
class Batch:
    """The scored tokens of one call (`N` of them) and the loop over their chunks."""

    objective: Objective
    head: Head
    hidden: Tensor
    labels: Tensor
    prior_head: Head | None
    prior_hidden: Tensor | None
    token_weights: Tensor | None
    sequence_ids: Tensor | None
    chunk_tokens: int | None
    kernel: Kernel
    observer: Callable[[slice, TokenTarget], None] | None = None
    top_k: TopKPrior | None = None
    group: SequenceGroup | None = None

    def __post_init__(self):
        # Autocast is read here, before it is switched off for the loop.
        self.operands = gemm.operand_dtype(self.hidden, self.head.weight)
        self.dtype = gemm.result_dtype(self.operands)
        # Rounded once for the products of all chunks. The sums of its gradient are in `dtype` all the same.
        self.weight = gemm.narrowed(self.head.weight, self.operands)
        tokens, vocabulary = max(1, len(self.labels)), self.head.weight.size(0)
        if self.prior_head is not None:
            # Conditioned on the tokens that both have: rows that only it has are not even multiplied.
            self.prior_head = self.prior_head.first(vocabulary)
            weight = self.prior_head.weight
            self.prior_operands = gemm.operand_dtype(self.prior_hidden, weight)
            is_same = weight.is_set_to(self.head.weight) and self.prior_operands == self.operands
            self.prior_weight = self.weight if is_same else gemm.narrowed(weight, self.prior_operands)
        self.embeddings = Embeddings(self.head.weight, self.labels)
        two = self.prior_head is not None or (self.top_k is not None and self.kernel.writes_prior)
        elements = chunk_elements(self.hidden.device, self.dtype, 1 + two)
        most = min(self.chunk_tokens or max(1, elements // vocabulary), tokens)
        chunks = -(-tokens // most)
        self.chunk = -(-tokens // chunks)  # equal chunks: a small last one would waste the speed of its products
        self.block = self.kernel.block_tokens(vocabulary, self.hidden.device)
        shape = (self.chunk, vocabulary)
        self.logits = torch.empty(shape, dtype=self.dtype, device=self.hidden.device)
        self.prior_logits = torch.empty_like(self.logits) if self.prior_head is not None else None
        if self.top_k is not None:
            self.top_k = self.top_k.like(self.logits)

    def run(
        self, inverse_count: Tensor, hidden_grad: bool, weight_grad: bool, bias_grad: bool
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Score every chunk; return the statistics `[N]` and the gradients of hidden, weight and bias."""
        tokens, head = len(self.labels), self.head
        new = self.logits.new_zeros
        statistics = {name: new(tokens) for name in STATISTICS}
        any_grad = hidden_grad or weight_grad or bias_grad
        gradients = [
            new(self.hidden.shape) if hidden_grad else None,
            new(head.weight.shape) if weight_grad else None,
            new(head.weight.size(0)) if bias_grad else None,
        ]
        trust = self._sequence_trust() if self.objective.trust.per_sequence else None

        # A bias has no product that would round to the operands' dtype, so neither must its gradient be.
        grad_dtype = self.dtype if bias_grad else self.operands
        zeros = ZeroSearch(self.objective, self.logits.device)

        for chunk, logits, prior_logits in self._project():
            grad_logits = self.kernel.gradient_of(logits, grad_dtype)
            written, pulling = 0, []
            for block in self._blocks(chunk):
                local = slice(block.start - chunk.start, block.stop - chunk.start)
                z = logits[local]
                slope = self.kernel.slope(head, z) if any_grad else None
                tile = self._tile(block, z, None if prior_logits is None else prior_logits[local])
                target = self.objective.target(tile, None if trust is None else trust[block])
                self._record(statistics, block, target)
                if self.observer is not None:
                    self.observer(block, target)
                if any_grad:
                    rows = zeros.rows(target)
                    out = grad_logits[written : written + len(z)]
                    written += self.kernel.write_gradient(out, target, inverse_count, slope, rows)
                    pulling.append((block, rows))
                del tile, target  # before what the next block's trust makes
            if any_grad:
                self._multiply_back(gradients, grad_logits[:written], self._tokens(chunk, pulling))
        return statistics, gradients

    def _tokens(self, chunk: slice, pulling: list[tuple[slice, Tensor | None]]) -> slice | Tensor:
        """Tokens of a chunk that have a gradient: a slice where all have."""
        if all(rows is None for _, rows in pulling):
            return chunk
        device = self.labels.device
        return torch.cat(
            [
                torch.arange(block.start, block.stop, device=device) if rows is None else rows + block.start
                for block, rows in pulling
            ]
        )

    def _multiply_back(self, gradients: list[Tensor | None], grad_logits: Tensor, tokens: slice | Tensor) -> None:
        """Add what `grad_logits[m, V]` of some tokens is to the gradients of hidden, weight and bias."""
        if not len(grad_logits):
            return
        of_hidden, of_weight, of_bias = gradients
        if of_hidden is not None:
            out = (
                of_hidden[tokens] if isinstance(tokens, slice) else of_hidden.new_empty(len(tokens), of_hidden.size(1))
            )
            gemm.backproject(out, grad_logits, self.weight, self.operands)
            if not isinstance(tokens, slice):
                of_hidden.index_copy_(0, tokens, out)
        if of_weight is not None:
            gemm.accumulate_weight(of_weight, grad_logits, self.hidden[tokens], self.operands)
        if of_bias is not None:
            of_bias += grad_logits.sum(0)

    def _project(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield each chunk with its logits and its prior's logits, in buffers that the next chunk overwrites."""
        for start in range(0, len(self.labels), self.chunk):
            chunk = slice(start, min(start + self.chunk, len(self.labels)))
            logits, prior_logits = self.logits[: chunk.stop - start], None
            gemm.project(logits, self.hidden[chunk], self.weight, self.operands)
            if self.prior_head is not None:
                prior_logits = self.prior_logits[: chunk.stop - start]
                shared = prior_logits[:, : self.prior_weight.size(0)]
                gemm.project(shared, self.prior_hidden[chunk], self.prior_weight, self.prior_operands)
                # What only the policy has; each time, as kernels work in this memory.
                prior_logits[:, shared.size(1) :] = -math.inf
            for block in self._blocks(slice(0, chunk.stop - start)):
                self.head.transform(logits[block])
                if self.prior_head is not None:
                    self.prior_head.transform(shared[block])
            yield chunk, logits, prior_logits

    def _blocks(self, chunk: slice) -> Iterator[slice]:
        for start in range(chunk.start, chunk.stop, self.block):
            yield slice(start, min(start + self.block, chunk.stop))

    @property
    def _has_prior(self) -> bool:
        return self.prior_head is not None or self.top_k is not None

    def _tile(self, block: slice, logits: Tensor, prior_logits: Tensor | None) -> Tile:
        weights = None if self.token_weights is None else self.token_weights[block]
        prior = prior_logits if self.top_k is None else self.top_k[block]
        return self.kernel.tile(logits, self.labels[block], prior, weights, self.embeddings)

    def _sequence_trust(self) -> Tensor:
        """γ `[N]` of a trust that needs whole sequences, from one extra pass over the logits."""
        policy, prior = self.logits.new_empty(len(self.labels)), None
        if self._has_prior:
            prior = torch.empty_like(policy)
        for chunk, logits, prior_logits in self._project():
            for block in self._blocks(chunk):
                local = slice(block.start - chunk.start, block.stop - chunk.start)
                tile = self._tile(block, logits[local], None if prior_logits is None else prior_logits[local])
                policy[block] = tile.label_log_probs
                if prior is not None:
                    prior[block] = tile.prior_label_log_probs
        labels = LabelStatistics(policy, policy if prior is None else prior, self.token_weights, self.sequence_ids)
        return self.objective.token_trust(labels) if self.group is None else self.group.trust(self.objective, labels)

    def _record(self, statistics: dict[str, Tensor], block: slice, target: TokenTarget) -> None:
        statistics["token_loss"][block] = self.objective.value(target)
        statistics["nll"][block] = target.nll
        statistics["trust"][block] = target.trust
        statistics["label_mass"][block] = target.label_mass
        statistics["kl"][block] = target.kl
        statistics["entropy"][block] = target.tile.policy.entropy
        statistics["is_top1"][block] = target.tile.is_top1.to(self.dtype)
        if self.top_k is not None:
            statistics["prior_is_top1"][block] = (
                self.top_k[block].is_top1(self.labels[block], target.tile.is_top1).to(self.dtype)
            )
        else:
            statistics["prior_is_top1"][block] = math.nan if self.prior_head is None else target.tile.prior_is_top1
