"""What a head says of some tokens, as a top-k prior: for a cache of a teacher that runs once."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import gemm
from ..gemm import Head
from ..target.tile import finite, floor_of, log_softmax_
from ..target.top_k import TopKPrior
from .chunks import chunk_elements


@torch.no_grad()
def read_top_k(hidden: Tensor, head: Head, labels: Tensor, k: int) -> TopKPrior:
    """The `k` most probable tokens after `hidden[N, H]`, those of the same logits that the fused loss computes.

    Args:
        hidden: `[N, H]`, final hidden states.
        head: the LM head, whole.
        labels: `[N]`, the tokens whose own probability is kept beside.
        k: how many, at most the vocabulary.
    """
    found = []
    for block, log_probs in log_probs_by_block(hidden, head):
        top = log_probs.topk(k, dim=-1)
        of_label = log_probs.gather(1, labels[block, None]).squeeze(1)
        found.append((top.indices, top.values, of_label, _log_sum_of_others(log_probs, top.indices)))
    return TopKPrior(*(torch.cat(values) for values in zip(*found, strict=True)))


@torch.no_grad()
def log_probs_by_block(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Natural log-probabilities `[n, V]` after `hidden[N, H]`, for so many rows at a time as memory is meant for."""
    operands = gemm.operand_dtype(hidden, head.weight)
    weight, dtype = gemm.narrowed(head.weight, operands), gemm.result_dtype(operands)
    size = max(1, chunk_elements(hidden.device, dtype, 2) // len(weight))
    for start in range(0, len(hidden), size):
        block = slice(start, min(start + size, len(hidden)))
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.empty(block.stop - start, len(weight), dtype=dtype, device=hidden.device)
            gemm.project(logits, hidden[block], weight, operands)
            head.transform(logits)
            log_probs = log_softmax_(finite(logits, in_place=True))
        yield block, log_probs


def _log_sum_of_others(log_probs: Tensor, ids: Tensor) -> Tensor:
    """`[n]`, log-sum of `log_probs[n, V]`, overwritten, without `ids[n, k]`; `-inf` where nothing is left."""
    floor = floor_of(log_probs.dtype)
    log_probs.scatter_(1, ids, floor)
    top = log_probs.amax(-1, keepdim=True)
    total = log_probs.sub_(top).exp_().sum(-1).log_() + top.squeeze(-1)
    return total.masked_fill_(top.squeeze(-1) <= floor / 2, -math.inf)
