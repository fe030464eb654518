"""Sequences that are split over ranks: what a batch brings along, where its loss is counted, and what is refused.

Under DeepSpeed's Ulysses (`sp_size`) and PyTorch's ring attention (`cp_size`) every rank has a piece of each row of a
training batch, of the same batch as the others of its group. Nobody can look over the border of a piece, so all that
belongs to the next token is moved to the one before while rows are whole. Evaluation is not split.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import transformers.trainer
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..loss.group import SequenceGroup
from ..loss.request import IGNORE_INDEX
from ..priors.base import base_model_of
from ..priors.ulysses import (
    check_attention,
    has_packed_rows,
    in_pieces,
    is_split,
    tell_documents_apart,
    ulysses_of,
)
from .batch import ALL_KEYS, SHIFT, exact_weights, is_piece, shifted
from .columns import PLACES_KEY, SEQUENCES_KEY, WEIGHTS_KEY, sequences_of


logger = get_logger(__name__)

# Where documents begin, in other words than positions: what has one entry a document cannot be split by tokens.
_OF_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_PADDING = {"labels": IGNORE_INDEX, PLACES_KEY: -1}


@dataclass
class SplittableCollator:
    """A data collator whose batches can be cut at any token.

    Args:
        collate: the collator.
        multiple: of which the length of every row is made one, by padding.
        documents: whether the target asks for whole documents.
    """

    collate: Callable[..., Mapping[str, Any]]
    multiple: int
    documents: bool

    def __call__(self, examples: Any, *more: Any) -> dict[str, Any]:
        batch = dict(self.collate(examples, *more))
        rows, length = batch["input_ids"].shape
        if "position_ids" not in batch:
            batch["position_ids"] = torch.arange(length).expand(rows, length).contiguous()
        if self.documents and SEQUENCES_KEY not in batch:
            batch[SEQUENCES_KEY] = sequences_of(batch).contiguous()
        for key in (WEIGHTS_KEY, SEQUENCES_KEY, PLACES_KEY):
            if key in batch:
                batch[SHIFT + key] = shifted(key, batch.pop(key))
        missing = -length % self.multiple
        per_token = {key: value for key, value in batch.items() if key not in _OF_DOCUMENTS}
        return {key: _padded(key, value, missing) if missing else value for key, value in per_token.items()}


def _padded(key: str, values: Any, count: int) -> Any:
    if not isinstance(values, Tensor) or values.dim() != 2:
        return values
    return F.pad(values, (0, count), value=_PADDING.get(key.removeprefix(SHIFT), 0))


class SplitSequences:
    """The trainer's side of a split: where a batch's neighbours are, and how its loss is put together.

    Args:
        accelerator: knows the ranks.
        size: ranks that share a batch.
        multiple: of which the length of every row has to be one.
        factor: what the gradients of a group's ranks are divided by, beside the number of batches.
    """

    def __init__(self, accelerator: Accelerator, size: int, multiple: int, factor: int):
        self.accelerator, self.size, self.multiple, self.factor = accelerator, size, multiple, factor

    @property
    def group(self) -> SequenceGroup:
        """The ranks that share a batch; known once the policy is prepared."""
        raise NotImplementedError

    def prepared(self, context: Callable[[], Any], inputs: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
        """What transformers does around a training step, as `Trainer._prepare_context_parallel_inputs` returns it."""
        return context, inputs

    def group_of(self, inputs: Mapping[str, Any]) -> SequenceGroup | None:
        """The ranks that have the other pieces of a batch; None for whole rows."""
        return self.group if is_piece(inputs) else None

    def passing(self, inputs: Mapping[str, Any]) -> Any:
        """A context for all passes over a batch."""
        return nullcontext()

    def epoch(self, loader: Any, number: int) -> Any:
        """A context for an epoch, the `number`th from 0, of the batches that a loader gives."""
        return nullcontext()

    def loss(self, of_tokens: Tensor, of_batch: Tensor | None, of_pieces: Tensor | None) -> Tensor:
        """A loss whose value is that of the whole batch, and whose gradient is this rank's part of it.

        Args:
            of_tokens: the sum over this rank's tokens.
            of_batch: what every rank of the group computes alike, or None.
            of_pieces: whose value is that of the whole batch already, and whose gradient is the part, or None.
        """
        loss = _scaled_gradient(self.group.with_value_of_all(of_tokens), self.factor)
        if of_batch is not None:
            loss = loss + _scaled_gradient(of_batch, self.factor / self.size)
        return loss if of_pieces is None else loss + _scaled_gradient(of_pieces, self.factor)


class UlyssesSequences(SplitSequences):
    """DeepSpeed's: pieces of sequences are exchanged for heads in every attention layer.

    Args:
        accelerator: knows the ranks.
        packed: whether rows hold several documents.
    """

    def __init__(self, accelerator: Accelerator, packed: bool):
        # ZeRO-1 and 2 divide the sum of all ranks' gradients by the number of batches, ZeRO-3 by that of ranks.
        zero, size = _zero(accelerator), accelerator.parallelism_config.sp_size
        super().__init__(accelerator, size, multiple=size, factor=size if zero["stage"] == 3 else 1)
        self.packed = packed

    @cached_property
    def group(self) -> SequenceGroup:
        from deepspeed.utils import groups

        return SequenceGroup(groups._get_sequence_parallel_group())

    def passing(self, inputs: Mapping[str, Any]) -> Any:
        attention = ulysses_of(self.accelerator)
        if self.packed and attention is not None:  # of whole rows too, which it takes over once the policy is prepared
            tell_documents_apart(attention)
        return in_pieces(self.accelerator) if is_piece(inputs) else nullcontext()

    @contextmanager
    def epoch(self, loader: Any, number: int) -> Iterator[None]:
        # DeepSpeed's loader goes on where an epoch has left it, and knows no numbers of epochs.
        _begin(loader, number)
        former = transformers.trainer.skip_first_batches
        transformers.trainer.skip_first_batches = partial(_without_first_batches, former, number)
        try:
            yield
        finally:
            transformers.trainer.skip_first_batches = former


def _begin(loader: Any, epoch: int) -> None:
    """Have DeepSpeed's loader of pieces begin the batches of an epoch."""
    if hasattr(loader.dl, "set_epoch"):
        loader.dl.set_epoch(epoch)
    loader.iter = iter(loader.dl)
    loader.micro_batches.clear()


def _without_first_batches(skip: Callable[[Any, int], Any], epoch: int, loader: Any, count: int) -> Any:
    """`skip(loader, count)`, Accelerate's, for DeepSpeed's loader, whose dataset is that of the loader inside."""
    whole, rest = divmod(count, loader.sp_world_size)
    left = copy.copy(loader)
    left.dl, left.micro_batches = skip(loader.dl, whole), deque()
    _begin(left, epoch)
    for _ in range(rest):
        next(left)
    return left


class RingSequences(SplitSequences):
    """PyTorch's, under FSDP2: keys and values go round. Each rank has a piece from either end of a row."""

    def __init__(self, accelerator: Accelerator):
        size = accelerator.parallelism_config.cp_size
        super().__init__(accelerator, size, multiple=2 * size, factor=size)

    @cached_property
    def group(self) -> SequenceGroup:
        return SequenceGroup(self.accelerator.torch_device_mesh["cp"].get_group())

    def prepared(self, context: Callable[[], Any], inputs: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
        own = [inputs[key] for key in ALL_KEYS if key in inputs]
        given = context.keywords
        buffers, dims = [*given["buffers"], *own], [*given["buffer_seq_dims"], *[1] * len(own)]
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        return partial(context, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers=set(buffers)), inputs


def _zero(accelerator: Accelerator) -> Mapping[str, Any]:
    return accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]


def _scaled_gradient(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor - value.detach() * (factor - 1)


def split_sequences(accelerator: Accelerator, model: nn.Module, args: Any, collator: Any) -> SplitSequences | None:
    """How sequences are split over ranks; None where they are not.

    Raises:
        ValueError: they are, in a way in which the loss would be another one.
    """
    if not is_split(accelerator):
        return None
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "`peft_config` is of prompt learning, whose virtual tokens every piece of a split sequence would get: use "
            "another kind of adapter, or set `sp_size` and `cp_size` to 1."
        )
    one_row = bool(getattr(collator, "padding_free", False))
    packed = one_row or has_packed_rows(args)
    if accelerator.parallelism_config.cp_enabled:
        if packed:
            raise ValueError(
                "`cp_size` hands attention no mask, so documents of one row would see each other: set `packing` and "
                "`padding_free` to False, or use `sp_size`."
            )
        logger.warning("Context parallelism (`cp_size`) is written for GPUs and has not been run on any.")
        return RingSequences(accelerator)
    check_attention("model", base_model_of(model), accelerator)
    if one_row and args.per_device_train_batch_size > 1:
        raise ValueError(
            f"`per_device_train_batch_size={args.per_device_train_batch_size}`: a packed or padding-free batch is one "
            "row, and DeepSpeed's attention is made for the number of rows that is said here. Set it to 1, and "
            "`gradient_accumulation_steps` or `max_length` higher."
        )
    if not _zero(accelerator).get("reduce_scatter", True) and _zero(accelerator).get("stage") == 3:
        raise ValueError(
            "`reduce_scatter=False` of ZeRO-3 divides gradients by another number under sequence parallelism, "
            "depending on their size: leave it at True."
        )
    return UlyssesSequences(accelerator, packed=packed)


class SplitMixin:
    """What a split changes around a trainer's steps, for a `transformers.Trainer` to inherit before its own.

    Attributes:
        _split: how sequences are split over ranks, or None.
    """

    _split: SplitSequences | None = None

    def _splittable(self, collator: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
        if self._split is None:
            return collator
        return SplittableCollator(collator, self._split.multiple, self.prior_choice.objective.trust.per_sequence)

    def _passing(self, inputs: Mapping[str, Any]) -> Any:
        return nullcontext() if self._split is None else self._split.passing(inputs)

    def _group_of(self, inputs: Mapping[str, Any]) -> SequenceGroup | None:
        return None if self._split is None else self._split.group_of(inputs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        split = self._split
        with nullcontext() if split is None else split.epoch(kwargs["train_dataloader"], kwargs["epoch"]):
            super()._run_epoch(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(inputs) | exact_weights(inputs, self.args.device)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        return (context, inputs) if self._split is None else self._split.prepared(context, inputs)
