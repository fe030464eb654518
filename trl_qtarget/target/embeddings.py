"""What designs ask of the output embeddings."""

from functools import cached_property

import torch
from torch import Tensor

from .. import gemm


# Cosine similarities searched at a time: 16 Mi elements, 64 MiB in float32.
_SEARCH_ELEMENTS = 1 << 24


class Embeddings:
    """The output embeddings `weight[V, H]`, and what designs ask of them, computed once for all tiles of a call.

    `labels[N]` are the labels of that call.
    """

    def __init__(self, weight: Tensor, labels: Tensor):
        self.weight = weight
        self._labels = labels
        self._found: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.unique(self._labels)  # sorted

    def nearest(self, labels: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine similarities and ids, both `[n, k]`, of the tokens nearest to `labels[n]`, themselves left out."""
        if (k, dtype) not in self._found:
            self._found[k, dtype] = self._search(k, dtype)
        cosines, tokens = self._found[k, dtype]
        rows = torch.searchsorted(self._tokens, labels)
        return cosines[rows], tokens[rows]

    def _search(self, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = self.weight
        norms = gemm.row_norms(weight, dtype).clamp_(min=torch.finfo(dtype).tiny)
        best = []
        for tokens in self._tokens.split(max(1, _SEARCH_ELEMENTS // weight.size(0))):
            cosines = norms.new_empty(len(tokens), weight.size(0))
            gemm.project(cosines, weight[tokens], weight, weight.dtype)
            cosines.div_(norms).div_(norms[tokens, None])
            cosines.scatter_(1, tokens[:, None], -torch.inf)
            best.append(cosines.topk(k, dim=-1))
        return torch.cat([values for values, _ in best]), torch.cat([tokens for _, tokens in best])
