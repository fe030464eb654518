"""The fused loss: hidden states times LM head, toward a target, without the `[N, V]` logits.

Tokens are scored in chunks. While a chunk's logits are at hand, every statistic, the loss and at once the gradient
`s (p - Q)/num_items` are computed, the gradient over the logits in place, and multiplied back into the gradients of
the hidden states and of the head. The backward pass only multiplies by the incoming scalar. So nothing is projected
twice: 3 products of size N·V·H (2 with a frozen head), and one more with a prior.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .checks import check_head, check_labels, check_num_items, check_per_token, check_token_weights, check_vocabulary
from .config import QTargetConfig
from .gemm import Head
from .methods import Objective, TokenTarget
from .tile import Embeddings, LabelStatistics, Measure, Tile, finite


# Logits of a chunk: 64 Mi elements, 256 MiB in float32. Large enough for full-speed products (hundreds of tokens at
# the largest vocabularies), small beside the rest of a training step.
_CHUNK_ELEMENTS = 1 << 26
# Logits worked on at a time between two products. On a CPU this block stays in the cache through all passes over it.
# An accelerator has no such cache, but what a pass makes anew (probabilities, a residual) is as large as the block,
# and several of those live at once: with a quarter of a chunk, 64 MiB in float32, they add about one chunk and not
# several, and a kernel on it still takes longer than its launch.
_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_DEFAULT_BLOCK_ELEMENTS = 1 << 24


# Called with the positions `[n]` of some scored tokens among all, and their target.
Observer = Callable[[Tensor, TokenTarget], None]


@dataclass
class LinearQTargetOutput:
    """Result of [`linear_qtarget_loss`][trl_qtarget.linear_qtarget_loss].

    `loss` is a scalar with gradient. All others are `[N]`, detached, and zero where the label is ignored:

    Attributes:
        loss: sum of `token_loss` over `num_items_in_batch`.
        token_loss: the published objective of each token.
        nll: plain negative log-likelihood of the label, in nats.
        trust: γ.
        label_mass: Q(y), the probability that the target puts on the label.
        kl: KL(Q‖p) in nats; NaN where Q has negative entries.
        entropy: entropy of the policy, in nats.
        is_top1: 1 where the label is the most probable token; among equals the first one is, as TRL counts.
        prior_is_top1: the same of the prior; NaN without one.
        scored: whether the label is not ignored (bool).
    """

    loss: Tensor
    token_loss: Tensor
    nll: Tensor
    trust: Tensor
    label_mass: Tensor
    kl: Tensor
    entropy: Tensor
    is_top1: Tensor
    prior_is_top1: Tensor
    scored: Tensor


def _kept_dtype(value: Tensor) -> torch.dtype:
    """dtype in which a gradient waits for the backward pass."""
    # An fp16 gradient only fits its dtype after it was multiplied by the loss scale, which comes with the backward.
    return torch.float32 if value.dtype == torch.float16 else value.dtype


_STATISTICS = ("token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1", "prior_is_top1")


class _PrecomputedGradient(torch.autograd.Function):
    """Attach gradients that were computed in the forward pass to a scalar loss."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [None if value is None else value.dtype for value in inputs]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "The fused loss keeps one set of gradients, which a first backward pass has already taken: compute "
                "the loss again for a second one, or use `qtarget_loss` on dense logits."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second copy of the head's gradient would double what the loss needs at its peak.
        return (
            None,
            None,
            *(
                None if gradient is None else gradient.mul_(grad_loss).to(dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )


def linear_qtarget_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: QTargetConfig | str | dict[str, Any] | None,
    *,
    bias: Tensor | None = None,
    prior_hidden: Tensor | None = None,
    prior_weight: Tensor | None = None,
    prior_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    prior_logit_scale: float = 1.0,
    prior_logit_softcap: float | None = None,
    ignore_index: int = -100,
) -> LinearQTargetOutput:
    """The loss of a configuration from hidden states and an LM head, equal to `qtarget_loss` on their logits.

    Args:
        hidden: `[N, H]`, the policy's last hidden states; position `i` predicts `labels[i]` (already shifted).
        weight: `[V, H]`, the LM head. Without `requires_grad`, the work for its gradient is left out.
        labels: `[N]`, the observed tokens; those equal to `ignore_index` are not even projected.
        config: a `QTargetConfig`, a method's name, or a dict of fields.
        bias: `[V]`, bias of the head.
        prior_hidden, prior_weight, prior_bias: `[N, H']`, `[V, H']`, `[V]`, the same of the prior, whose width H' may
            differ. Without them `target_sft` and free combinations use the policy itself; every other method with a
            prior raises.
        token_weights: `[N]`, weights of the trust `token_weights`.
        sequence_ids: `[N]`, which document a token belongs to, for per-sequence trusts; None means one sequence.
        num_items_in_batch: what the summed loss is divided by; None means the number of labelled tokens here.
        logit_scale, logit_softcap: the head computes `softcap · tanh(scale · logits / softcap)`.
        prior_logit_scale, prior_logit_softcap: the same of the prior's head.
        ignore_index: label of tokens that are not scored.

    Returns:
        A [`LinearQTargetOutput`][trl_qtarget.linear.LinearQTargetOutput] with `.loss` and per-token statistics.
        If every label is ignored the loss is a differentiable zero. With gradients disabled, none is computed.

    Raises:
        ValueError: an argument is missing, misshapen or out of range.
    """
    config = QTargetConfig.coerce(config)
    check_head("", hidden, weight, bias, logit_softcap)
    check_num_items(num_items_in_batch)
    if (prior_hidden is None) != (prior_weight is None):
        raise ValueError("`prior_hidden` and `prior_weight` belong together: pass both or none.")
    if prior_bias is not None and prior_hidden is None:
        raise ValueError("`prior_bias` is a bias without a head: pass `prior_hidden` and `prior_weight` with it.")
    objective = config.objective(has_prior=prior_hidden is not None)
    labels, _ = check_labels(labels, hidden.size(0), weight.size(0), ignore_index)
    check_token_weights(token_weights, len(labels), objective)
    check_per_token("sequence_ids", sequence_ids, len(labels))
    prior_head = None
    if prior_hidden is not None:
        check_head("prior_", prior_hidden, prior_weight, prior_bias, prior_logit_softcap)
        check_vocabulary("prior_weight", prior_weight.size(0), weight.size(0))
        if prior_hidden.size(0) != hidden.size(0):
            raise ValueError(f"`prior_hidden` must have one row per row of `hidden`, got {list(prior_hidden.shape)}.")
        prior_head = Head(prior_weight, prior_bias, prior_logit_scale, prior_logit_softcap)
    return fused_loss(
        objective,
        hidden,
        Head(weight, bias, logit_scale, logit_softcap),
        labels,
        prior_hidden=prior_hidden,
        prior_head=prior_head,
        token_weights=token_weights,
        sequence_ids=sequence_ids,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        chunk_tokens=config.chunk_tokens,
    )


def fused_loss(
    objective: Objective,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    prior_hidden: Tensor | None = None,
    prior_head: Head | None = None,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    observer: Observer | None = None,
) -> LinearQTargetOutput:
    """`linear_qtarget_loss` for arguments that are known to be good, as the trainer's are.

    `observer` is shown the target of every block, with the positions `[n]` of its tokens, before the next one replaces
    it: so what is looked at is what is trained toward.
    """
    scored = labels != ignore_index
    index = scored.nonzero().squeeze(1)

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach()[index]

    batch = _Batch(
        objective=objective,
        head=head.detach(),
        hidden=rows(hidden),
        labels=labels[index],
        prior_head=prior_head.detach() if objective.uses_prior else None,
        prior_hidden=rows(prior_hidden) if objective.uses_prior else None,
        token_weights=rows(token_weights),
        sequence_ids=rows(sequence_ids),
        chunk_tokens=chunk_tokens,
        observer=None if observer is None else lambda block, target: observer(index[block], target),
    )
    count = len(index) if num_items_in_batch is None else num_items_in_batch
    inverse_count = 1 / torch.as_tensor(count, dtype=batch.dtype, device=hidden.device).clamp(min=1).reshape(())

    inputs = (hidden, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and value is not None and value.requires_grad for value in inputs]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        statistics, gradients = batch.run(inverse_count, *wanted)
        loss = statistics["token_loss"].sum() * inverse_count
        if gradients[0] is not None:
            rows_of_all = gradients[0].new_zeros(hidden.shape, dtype=_kept_dtype(hidden))
            gradients[0] = rows_of_all.index_copy_(0, index, gradients[0].to(rows_of_all.dtype))
        gradients = tuple(
            None if gradient is None else gradient.to(_kept_dtype(value))
            for gradient, value in zip(gradients, inputs, strict=True)
        )
        spread = {
            name: value.new_zeros(len(labels)).index_copy_(0, index, value) for name, value in statistics.items()
        }
    if any(wanted):
        loss = _PrecomputedGradient.apply(loss, gradients, *inputs)
    return LinearQTargetOutput(loss=loss, scored=scored, **spread)


@dataclass
class _Batch:
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
    observer: Callable[[slice, TokenTarget], None] | None = None

    def __post_init__(self):
        # Autocast is read here, before it is switched off for the loop.
        self.operands = gemm.operand_dtype(self.hidden, self.head.weight)
        self.dtype = gemm.result_dtype(self.operands)
        if self.prior_head is not None:
            self.prior_operands = gemm.operand_dtype(self.prior_hidden, self.prior_head.weight)
        self.embeddings = Embeddings(self.head.weight, self.labels)
        tokens, vocabulary = max(1, len(self.labels)), self.head.weight.size(0)
        most = min(self.chunk_tokens or max(1, _CHUNK_ELEMENTS // vocabulary), tokens)
        chunks = -(-tokens // most)
        self.chunk = -(-tokens // chunks)  # equal chunks: a small last one would waste the speed of its products
        elements = _BLOCK_ELEMENTS.get(self.hidden.device.type, _DEFAULT_BLOCK_ELEMENTS)
        self.block = max(1, elements // vocabulary)
        shape = (self.chunk, vocabulary)
        self.logits = torch.empty(shape, dtype=self.dtype, device=self.hidden.device)
        self.prior_logits = torch.empty_like(self.logits) if self.prior_head is not None else None

    def run(
        self, inverse_count: Tensor, hidden_grad: bool, weight_grad: bool, bias_grad: bool
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Score every chunk; return the statistics `[N]` and the gradients of hidden, weight and bias."""
        tokens, head = len(self.labels), self.head
        new = self.logits.new_zeros
        statistics = {name: new(tokens) for name in _STATISTICS}
        any_grad = hidden_grad or weight_grad or bias_grad
        gradients = [
            new(self.hidden.shape) if hidden_grad else None,
            new(head.weight.shape) if weight_grad else None,
            new(head.weight.size(0)) if bias_grad else None,
        ]
        trust = self._sequence_trust() if self.objective.trust.per_sequence else None

        for chunk, logits, prior_logits in self._project():
            for block in self._blocks(chunk):
                local = slice(block.start - chunk.start, block.stop - chunk.start)
                z = logits[local]
                slope = head.slope(z) if any_grad else None
                tile = self._tile(block, z, None if prior_logits is None else prior_logits[local])
                target = self.objective.target(tile, None if trust is None else trust[block])
                self._record(statistics, block, target)
                if self.observer is not None:
                    self.observer(block, target)
                if any_grad:
                    self._write_gradient(z, target, inverse_count, slope)
            if hidden_grad:
                gemm.backproject(gradients[0][chunk], logits, head.weight, self.operands)
            if weight_grad:
                gemm.accumulate_weight(gradients[1], logits, self.hidden[chunk], self.operands)
            if bias_grad:
                gradients[2] += logits.sum(0)
        return statistics, gradients

    def _project(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield each chunk with its logits and its prior's logits, in buffers that the next chunk overwrites."""
        for start in range(0, len(self.labels), self.chunk):
            chunk = slice(start, min(start + self.chunk, len(self.labels)))
            logits, prior_logits = self.logits[: chunk.stop - start], None
            gemm.project(logits, self.hidden[chunk], self.head.weight, self.operands)
            if self.prior_head is not None:
                prior_logits = self.prior_logits[: chunk.stop - start]
                gemm.project(prior_logits, self.prior_hidden[chunk], self.prior_head.weight, self.prior_operands)
            for block in self._blocks(slice(0, chunk.stop - start)):
                self.head.transform(logits[block])
                if self.prior_head is not None:
                    self.prior_head.transform(prior_logits[block])
            yield chunk, logits, prior_logits

    def _blocks(self, chunk: slice) -> Iterator[slice]:
        for start in range(chunk.start, chunk.stop, self.block):
            yield slice(start, min(start + self.block, chunk.stop))

    def _tile(self, block: slice, logits: Tensor, prior_logits: Tensor | None) -> Tile:
        return Tile(
            log_probs=finite(torch.log_softmax(logits, dim=-1, out=logits), in_place=True),
            labels=self.labels[block],
            prior_logits=None if prior_logits is None else finite(prior_logits, in_place=True),
            token_weights=None if self.token_weights is None else self.token_weights[block],
            output_embeddings=self.embeddings,
            reuse_buffers=True,
        )

    def _sequence_trust(self) -> Tensor:
        """γ `[N]` of a trust that needs whole sequences, from one extra pass over the logits."""
        policy, prior = self.logits.new_empty(len(self.labels)), None
        if self.prior_head is not None:
            prior = torch.empty_like(policy)
        for chunk, logits, prior_logits in self._project():
            for block in self._blocks(chunk):
                local = slice(block.start - chunk.start, block.stop - chunk.start)
                tile = self._tile(block, logits[local], None if prior is None else prior_logits[local])
                policy[block] = tile.label_log_probs
                if prior is not None:
                    prior[block] = tile.prior_label_log_probs
        labels = LabelStatistics(policy, policy if prior is None else prior, self.token_weights, self.sequence_ids)
        return self.objective.token_trust(labels)

    def _record(self, statistics: dict[str, Tensor], block: slice, target: TokenTarget) -> None:
        statistics["token_loss"][block] = self.objective.value(target)
        statistics["nll"][block] = target.nll
        statistics["trust"][block] = target.trust
        statistics["label_mass"][block] = target.label_mass
        statistics["kl"][block] = target.kl
        statistics["entropy"][block] = target.tile.policy.entropy
        statistics["is_top1"][block] = target.tile.is_top1.to(self.dtype)
        statistics["prior_is_top1"][block] = math.nan if self.prior_head is None else target.tile.prior_is_top1

    def _write_gradient(self, out: Tensor, target: TokenTarget, inverse_count: Tensor, slope: Tensor | float) -> None:
        """`out = s (p - γ δ - π̃⁺ + γ π̃⁻)/num_items · slope`, over the policy's log-probabilities.

        Measures that are the same tensor are added up first: a policy residual leaves `s γ (p - δ)`, one pass.
        """
        scale = target.scale * inverse_count
        trust = target.trust
        policy = target.tile.policy
        terms = [policy, target.positive, target.negative]
        signs = [(1, 0), (-1, 0), (0, 1)]  # coefficient = constant + factor · γ
        coefficients: dict[int, tuple[Measure, int, int]] = {}
        for measure, (constant, factor) in zip(terms, signs, strict=True):
            _, old_constant, old_factor = coefficients.get(id(measure), (measure, 0, 0))
            coefficients[id(measure)] = (measure, old_constant + constant, old_factor + factor)

        probs = [
            (measure.probs, (scale * (constant + factor * trust))[:, None])
            for measure, constant, factor in coefficients.values()
            if constant or factor
        ]
        (first, coefficient), rest = probs[0], probs[1:]
        torch.mul(first, coefficient, out=out)
        for values, coefficient in rest:
            out.addcmul_(values, coefficient)
        out.scatter_add_(1, target.tile.labels[:, None], (-scale * trust)[:, None])
        if isinstance(slope, Tensor):
            out.mul_(slope)
        elif slope != 1.0:
            out.mul_(slope)
