"""Designs in a module whose annotations are strings, some of names for type checkers alone, as users write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_qtarget.target.registry import Positive


if TYPE_CHECKING:
    from torch import Tensor

    from trl_qtarget.target.registry import Unit
    from trl_qtarget.target.tile import Tile


def focal(tile: Tile, *, beta: Positive = 2.0) -> Tensor:
    return (1 - tile.label_probs) ** beta


class Focal:
    def __call__(self, tile: Tile, *, beta: Positive = 2.0) -> Tensor:
        return focal(tile, beta=beta)


def unresolved(tile: Tile, *, lam: Unit = 0.5) -> Tensor:
    return tile.label_probs * lam
