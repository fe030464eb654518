"""A top-k prior in the place of a second model's logits, around either kernel.

With the k tokens put aside, a kernel's tile is of the policy's tail, as for any method without a prior: so the cost is
that of `dft` and some numbers `[n, k]`. Where the prior's tail is uniform, or a residual mixes in another way, its
log-probabilities are written out `[n, V]`, and the kernel goes on as with a second model's logits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gemm import Head
from ...target.embeddings import Embeddings
from ...target.objective import Objective
from ...target.residual import RESIDUALS
from ...target.split import SplitTile, plan_of
from ...target.tile import Measure, Tile, finite, floor_of, margin_of, rank_of
from ...target.token_target import TokenTarget
from ...target.top_k import TopKPrior


class _TailTarget(NamedTuple):
    """What a kernel reads of a target to write its gradient; here of a tail."""

    tile: Tile
    gradient: tuple[list[tuple[Measure, Tensor]], Tensor]


class _Slope(NamedTuple):
    """The inner kernel's slope, and the head for that of single logits."""

    inner: Any
    head: Head


class TopKKernel:
    """A kernel whose `tile` takes rows of a `TopKPrior` in the place of a prior's logits.

    Args:
        make: makes the kernel inside, of an objective.
        objective: the objective.
        prior: the prior of all tokens.
        vocabulary: V.

    Raises:
        ValueError: such a prior is not enough for the objective.
    """

    def __init__(self, make: Callable[[Objective], Any], objective: Objective, prior: TopKPrior, vocabulary: int):
        plan = plan_of(objective)
        # Where all is known, there is no tail.
        self._splits = plan.split and prior.tail == "policy" and prior.ids.size(1) < vocabulary
        self._label_alone = plan.label_alone
        self._compared = objective.statistics & {"rank", "margin"}
        # Of a tail, nothing but the policy is wanted.
        self._inner = make(replace(objective, residual=RESIDUALS["policy"]) if self._splits else objective)
        self.name = self._inner.name

    @property
    def writes_prior(self) -> bool:
        """Whether the prior is written out over the vocabulary."""
        return not (self._splits or self._label_alone)

    def block_tokens(self, vocabulary: int, device: torch.device) -> int:
        return self._inner.block_tokens(vocabulary, device)

    def gradient_of(self, logits: Tensor, operands: torch.dtype) -> Tensor:
        return self._inner.gradient_of(logits, operands)

    def slope(self, head: Head, logits: Tensor) -> _Slope:
        return _Slope(self._inner.slope(head, logits), head)

    def tile(
        self, logits: Tensor, labels: Tensor, prior: TopKPrior, token_weights: Tensor | None, embeddings: Embeddings
    ) -> Tile:
        """The tile of a block of `logits[n, V]`, out of which the k tokens may be taken."""
        if self._splits:
            return self._split(logits, labels, prior, token_weights, embeddings)
        written_out = prior.dense(logits) if self.writes_prior else None
        tile = self._inner.tile(logits, labels, written_out, token_weights, embeddings)
        # As if it had been asked for already.
        of_label = prior.label_log_probs
        of_label = of_label if prior.silent is None else prior.or_policy(of_label, tile.label_log_probs)
        vars(tile)["prior_label_log_probs"] = of_label
        return tile

    def _split(
        self, logits: Tensor, labels: Tensor, prior: TopKPrior, token_weights: Tensor | None, embeddings: Embeddings
    ) -> SplitTile:
        floor = floor_of(logits.dtype)
        known = finite(logits.gather(1, prior.ids))
        of_label = finite(logits.gather(1, labels[:, None]).squeeze(1))
        is_top1 = (logits.argmax(dim=-1) == labels) & (of_label > floor)
        functions = {"rank": rank_of, "margin": margin_of}
        compared = {name: functions[name](logits, labels) for name in self._compared}
        logits.scatter_(1, prior.ids, floor)
        tail = self._inner.tile(logits, labels, None, token_weights, embeddings)
        tile = SplitTile(tail, tail.log_sum, known, of_label, prior, is_top1)
        vars(tile).update(compared)
        return tile

    def write_gradient(
        self, out: Tensor, target: TokenTarget, factor: Tensor, slope: _Slope, rows: Tensor | None = None
    ) -> int:
        """`factor · s (p - Q) · slope` into the first rows of `out[n, V]`, of the tokens in `rows[m]` or of all.

        Returns how many rows were written.
        """
        if not self._splits:
            return self._inner.write_gradient(out, target, factor, slope.inner, rows)
        tile: SplitTile = target.tile
        terms, of_label = target.gradient
        of_events = sum(coefficient[:, None] * measure.events.exp() for measure, coefficient in terms)
        of_tail = of_events[:, -1]
        tail = _TailTarget(tile.tail, ([(tile.tail.policy, of_tail)], torch.zeros_like(of_tail)))
        written = self._inner.write_gradient(out, tail, factor, slope.inner, rows)
        known = of_events[:, :-1] * (factor * slope.head.slope(tile.known_logits))
        own = of_events.gather(1, tile.place[:, None]).squeeze(1) * tile.label_in_tail.exp() + of_label
        own = own * (factor * slope.head.slope(tile.label_logits))
        for ids, values in ((tile.prior.ids, known), (tile.labels[:, None], own[:, None])):
            ids, values = (each if rows is None else each[rows] for each in (ids, values))
            out[:written].scatter_(1, ids, values.to(out.dtype))
        return written
