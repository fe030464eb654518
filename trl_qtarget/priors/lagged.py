"""The lagged prior: the policy a few steps ago, or a moving average of it."""

import os
from collections.abc import Callable, Iterator, Mapping
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
from ..loss.head import PriorStates, head_of
from .base import Prior, backbone_states, base_model_of, inference
from .shards import exchanged, gather, in_zero3, reshard, scatter, share


STATE_NAME = "qtarget_prior.safetensors"


class LaggedPrior(Prior):
    """The policy's own model with other values for its trainable parameters: those of an earlier moment.

    Only trainable parameters are kept: for full fine-tuning a second set of weights, under PEFT the adapters alone; of
    a sharded model each rank keeps its share. Their values are exchanged for the time of one forward pass. A parameter
    must not become trainable later.

    Args:
        model: the policy.
        wrapped: called for the policy in its wrapper, which the trainer makes after this prior.
        sync_steps: optimiser steps between two syncs.
        decay: share of the old value that a sync keeps; None or 0 copies.
    """

    def __init__(
        self, model: nn.Module, wrapped: Callable[[], nn.Module], sync_steps: int, decay: float | None = None
    ):
        self.model, self.wrapped, self.sync_steps, self.decay = model, wrapped, sync_steps, decay
        self.parts: dict[str, Tensor] = {}

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        reshard(self.model)  # an evaluation leaves whole parameters in the place of the shares
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)

    def _kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # Small steps of a moving average would be lost in a half-precision value.
        return torch.float32 if self.decay and dtype in (torch.float16, torch.bfloat16) else dtype

    def start(self, step: int) -> None:
        if step == 0:  # else `load` has read them
            parts = ((name, share(value)) for name, value in self._trainable())
            self.parts = {name: part.to(self._kept_dtype(part.dtype), copy=True) for name, part in parts}

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        if not self.parts:  # an evaluation before any training
            self.start(0)
        with inference(self.model), exchanged(self.model, self.wrapped(), self.parts):
            if self._within_policy():
                hidden = backbone_states(self.model, inputs)
            else:
                hidden = self.model(**inputs, final_hidden=True).last_hidden_state
        # Asked for now: during a pass FSDP2 puts other parameters, whole ones, in the place of the sharded.
        return PriorStates(hidden, partial(self._head, head_of(base_model_of(self.model)), dict(self._trainable())))

    def request(self, inputs: Mapping[str, Any]) -> Callable[[], PriorStates]:
        return partial(self.states, inputs) if self._within_policy() else super().request(inputs)

    def _within_policy(self) -> bool:
        """Whether it runs within the policy's forward: under ZeRO-3, for the reason that `AdapterOffPrior` gives.

        FSDP2 has to see a pass of its own, and so have the virtual tokens of prompt learning.
        """
        virtual_tokens = is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
        return in_zero3(self.model) and not virtual_tokens

    def _head(self, live: Head, trainable: Mapping[str, nn.Parameter]) -> Head:
        """The head with this prior's values, whole."""

        def kept(value: Tensor | None) -> Tensor | None:
            names = [name for name, parameter in trainable.items() if parameter is value]
            return gather(value, self.parts[names[0]].to(value.dtype)) if names else value

        return replace(live, weight=kept(live.weight), bias=kept(live.bias))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step % self.sync_steps:
            return
        for name, value in self._trainable():
            part = self.parts[name]
            part.lerp_(share(value).to(part.dtype), 1 - (self.decay or 0.0))

    def save(self, directory: str | os.PathLike, should_save: bool) -> None:
        """Write the whole tensors, so that a run may go on with another number of ranks."""
        whole = {}
        for name, value in self._trainable():
            tensor = gather(value, self.parts[name])
            if should_save:
                whole[name] = tensor.cpu().contiguous()
        if should_save:
            with replacing(Path(directory) / STATE_NAME) as file:
                save_file(whole, file)

    def load(self, directory: str | os.PathLike) -> None:
        path = Path(directory) / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint` has no `{STATE_NAME}`, the weights of the lagged prior: {directory} was "
                "written with another prior. Resume with the prior it was written with, or start a new run from it."
            )
        saved: dict[str, Tensor] = load_file(path)
        parameters = dict(self._trainable())
        if saved.keys() != parameters.keys():
            raise ValueError(
                f"`{path}` holds other parameters than those being trained: resume with the same model and adapters."
            )
        self.parts = {name: scatter(parameters[name], whole).clone() for name, whole in saved.items()}
