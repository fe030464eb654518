"""The policy's own model as the prior, with other values for what is trained: those of its start or a while ago."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import replacing
from ..gemm import Head
from ..loss.body import inference
from ..loss.head import head_of
from ..loss.request import PriorStates
from .adapters import adapter_parameters
from .base import Prior, backbone_states, base_model_of
from .shards import exchanged, gather, in_fsdp2, in_zero3, reshard, scatter, share


STATE_NAME = "qtarget_prior.safetensors"


class OwnPrior(Prior):
    """The policy's own model, once more, with other values for its trainable parameters.

    Only what is trained and takes part in the pass is kept: for full fine-tuning a second set of weights, under PEFT
    the adapters alone, and with the adapters off nothing but what is trained beside them. Of a sharded model each rank
    keeps its share. The values are exchanged for the time of one forward pass.

    A parameter that becomes trainable later has not moved until then. So what it holds in the first pass that sees it
    trainable, before any step of its own, is its starting value.

    Args:
        model: the policy.
        wrapped: called for the policy in its wrapper, which the trainer makes after this prior.
        adapters: whether PEFT's adapters take part. Without them it is the model under them.
        sync_steps: optimiser steps between two syncs with the policy; None never syncs.
        decay: share of the old value that a sync keeps; None or 0 copies.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: Callable[[], nn.Module],
        *,
        adapters: bool = True,
        sync_steps: int | None = None,
        decay: float | None = None,
    ):
        self.model, self.wrapped, self.adapters = model, wrapped, adapters
        self.sync_steps, self.decay = sync_steps, decay
        self.parts: dict[str, Tensor] = {}
        self._left_out: frozenset[str] = frozenset()  # the adapters' parameters, where the prior is without them
        self._has_begun = False
        if not adapters:  # PEFT says it of biases that have been trained; here they have their starting values
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias configured to be")

    # --- what is kept ---

    def _unseen(self) -> list[str]:
        """Names of the trainable parameters that take part in the pass, and of which no value is kept yet."""

        def unseen() -> list[str]:
            trained = (name for name, value in self.model.named_parameters() if value.requires_grad)
            return [name for name in trained if name not in self.parts and name not in self._left_out]

        if unseen() and not self.adapters:
            self._left_out = adapter_parameters(self.model)
        return unseen()

    def _parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.model)  # an evaluation leaves whole parameters in the place of the shares
        return dict(self.model.named_parameters())

    def _kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # Small steps of a moving average would be lost in a half-precision value.
        return torch.float32 if self.decay and dtype in (torch.float16, torch.bfloat16) else dtype

    def _notice(self) -> None:
        """Keep the values of what has become trainable since this was last called."""
        unseen = self._unseen()
        if unseen:
            parameters = self._parameters()
            parts = {name: share(parameters[name]) for name in unseen}
            self.parts |= {name: part.to(self._kept_dtype(part.dtype), copy=True) for name, part in parts.items()}

    def fixed_parameters(self) -> dict[str, nn.Parameter]:
        left_out = self.parts.keys() | (frozenset() if self.adapters else adapter_parameters(self.model))
        parameters = self._parameters()
        return {name: it for name, it in parameters.items() if not it.requires_grad and name not in left_out}

    def start(self, step: int) -> None:
        if step == 0:  # else `load` has read them
            # What an evaluation before the training has kept was laid out as before the policy was wrapped. But if one
            # training follows another, the start is that of the first.
            if self.sync_steps or not self._has_begun:
                self.parts = {}
            self._notice()
        self._has_begun = True

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if not self.sync_steps or step % self.sync_steps:
            return
        parameters = self._parameters()
        for name, part in self.parts.items():
            part.lerp_(share(parameters[name]).to(part.dtype), 1 - (self.decay or 0.0))

    # --- the pass ---

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        self._notice()
        return self._run(inputs)

    def request(self, inputs: Mapping[str, Any]) -> Callable[[], PriorStates]:
        self._notice()
        if self._within_policy():
            return partial(self._run, inputs)
        states = self._run(inputs)
        return lambda: states

    def _run(self, inputs: Mapping[str, Any]) -> PriorStates:
        with inference(self.model), self._other_values(), self._adapters_as_said():
            if self._within_policy():
                hidden = backbone_states(self.model, inputs)
            else:
                hidden = self.model(**inputs, final_hidden=True).last_hidden_state
                # During a pass FSDP2 puts other parameters, whole ones, in the place of the sharded.
                reshard(self.model)
            # Here, where the values are exchanged: PEFT computes the weight of a head of which it trains some rows.
            return PriorStates(hidden, partial(self._head, *self._named(head_of(base_model_of(self.model)))))

    def _within_policy(self) -> bool:
        """Whether it runs within the policy's forward, on the layers alone, or as a pass of its own.

        Within it ZeRO-3 sees one pass whose order of modules never changes: a pass of its own would invalidate the
        recorded order, and with it the prefetching, in every step. But FSDP2 has to see exchanged values in a pass of
        their own, and virtual tokens are put before the text by a wrapper around the layers.
        """
        if not self.adapters:
            return not (self.parts and in_fsdp2(self.model))
        virtual_tokens = is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
        return in_zero3(self.model) and not virtual_tokens

    def _other_values(self):
        return exchanged(self.model, self.wrapped(), self.parts) if self.parts else nullcontext()

    @contextmanager
    def _adapters_as_said(self) -> Iterator[None]:
        with nullcontext() if self.adapters else self.model.disable_adapter():
            yield

    def _named(self, head: Head) -> tuple[Head, dict[str, tuple[str, nn.Parameter]]]:
        """The head, and of its weight and bias those that are parameters with a kept value, by their field."""
        names = {id(value): name for name, value in self.model.named_parameters() if name in self.parts}
        fields = {"weight": head.weight, "bias": head.bias}
        return head, {field: (names[id(value)], value) for field, value in fields.items() if id(value) in names}

    def _head(self, head: Head, kept: Mapping[str, tuple[str, nn.Parameter]]) -> Head:
        """The head with this prior's values, whole."""
        values = {field: gather(value, self.parts[name].to(value.dtype)) for field, (name, value) in kept.items()}
        return replace(head, **values)

    # --- checkpoints ---

    def save(self, directory: str | os.PathLike, should_save: bool) -> None:
        """Write the whole tensors, so that a run may go on with another number of ranks."""
        self._notice()
        whole, parameters = {}, self._parameters() if self.parts else {}
        for name, part in self.parts.items():
            tensor = gather(parameters[name], part)
            if should_save:
                whole[name] = tensor.cpu().contiguous()
        if whole:
            with replacing(Path(directory) / STATE_NAME) as file:
                save_file(whole, file)

    def load(self, directory: str | os.PathLike) -> None:
        path = Path(directory) / STATE_NAME
        if not path.is_file():
            if not self._unseen():  # nothing is trained that takes part in this prior
                return
            raise ValueError(
                f"`resume_from_checkpoint` has no `{STATE_NAME}`, the weights of this run's prior: {directory} was "
                "written with another prior, or with `save_only_model=True`. Resume from one that has it, with the "
                "prior it was written with, or start a new run from it."
            )
        saved: dict[str, Tensor] = load_file(path)
        self.parts = {}
        parameters = self._parameters()
        if not set(self._unseen()) <= saved.keys() <= parameters.keys():
            raise ValueError(
                f"`{path}` holds other parameters than those being trained: resume with the same model and adapters."
            )
        self.parts = {name: scatter(parameters[name], whole).clone() for name, whole in saved.items()}
