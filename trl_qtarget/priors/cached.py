"""What a prior has said before, read from a cache: no model runs beside the policy."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..loss.head import ModelHead
from ..loss.request import PriorStates, TopKStates
from ..target.top_k import TopKPrior
from .base import Prior
from .store import Manifest, PriorCache


# What a batch carries of the cache: rows of `PriorCache.read` for every token, `[B, T, W]`. The prior wants each at
# the token before the one that it speaks of.
ROWS_KEY = "prior_rows"


class CachedPrior(Prior):
    """A prior whose states come with the batch.

    Args:
        cache: the cache, of which only the head is read here.
        tail: how a top-k prior shares the mass of the rest.
    """

    def __init__(self, cache: PriorCache, tail: str):
        self.cache, self.tail = cache, tail
        self._head: ModelHead | None = None  # until it is first used, where it is used

    def states(self, inputs: Mapping[str, Any]) -> PriorStates | TopKStates:
        rows, manifest = inputs[ROWS_KEY], self.cache.manifest
        if manifest.form == "hidden":
            return PriorStates(rows.view(getattr(torch, manifest.dtype)), partial(self._head_on, rows.device))
        return TopKStates(top_k_of(rows, manifest, self.tail))

    def request(self, inputs: Mapping[str, Any]) -> Callable[[], PriorStates | TopKStates]:
        return partial(self.states, {ROWS_KEY: inputs[ROWS_KEY]})

    def _head_on(self, device: torch.device) -> ModelHead:
        if self._head is None or self._head.weight.device != device:
            tensors, manifest = load_file(self.cache.head, str(device)), self.cache.manifest
            shape = manifest.logit_scale, manifest.logit_softcap
            self._head = ModelHead(tensors["weight"], tensors.get("bias"), *shape)
        return self._head

    def fixed_parameters(self) -> dict[str, nn.Parameter]:
        return {}


def top_k_of(rows: Tensor, manifest: Manifest, tail: str) -> TopKPrior:
    """The prior in `rows[..., 2k + 2]` of a cache."""
    k = manifest.k
    numbers = rows[..., k:].contiguous().view(torch.float32)
    rest = numbers[..., k + 1]
    silent = rest.isnan() if manifest.own_tokenizer else None
    return TopKPrior(rows[..., :k], numbers[..., :k], numbers[..., k], rest.nan_to_num(neginf=-math.inf), tail, silent)
