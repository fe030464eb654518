"""Where the prior's hidden states come from: another model, the base under the adapters, or earlier weights.

All priors see the very inputs of the policy (packed position ids, images), run without gradients, dropout or gradient
checkpointing, and hand out hidden states and a head; the fused loss does the rest.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from .checks import check_vocabulary
from .config import QTargetConfig
from .head import PriorStates, add_target_head, head_of


logger = get_logger(__name__)

STATE_NAME = "qtarget_prior.safetensors"


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no gradient checkpointing; afterwards every module and parameter is as before."""
    # Not the linear layers: none has an evaluation mode of its own, and for 4-bit ones on a CPU bitsandbytes takes it
    # as a sign to repack the weights into a layout that no gradient passes through.
    modules = [module for module in model.modules() if module.training and not isinstance(module, nn.Linear)]
    # PEFT makes every adapter parameter trainable when it turns adapters on again, also one that the user froze.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)


class Prior:
    """A frozen or slowly moving distribution. `description` says in words which one."""

    description = ""

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        """Hidden states and head for the policy's inputs (labels and loss arguments are left out)."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Told after every optimiser step; `step` counts from 1."""

    def save(self, directory: str | os.PathLike) -> None:
        """Write into a checkpoint what a resumed run cannot reconstruct."""

    def load(self, directory: str | os.PathLike) -> None:
        """Read what `save` wrote."""


class ModelPrior(Prior):
    """Another model: the reference model, or teacher. `model` is the prepared wrapper of `causal_model`."""

    description = "the reference model"

    def __init__(self, model: nn.Module, causal_model: PreTrainedModel):
        self.model, self.causal_model = model, causal_model

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        with torch.no_grad():
            hidden = self.model(**inputs, final_hidden=True).last_hidden_state
        return PriorStates(hidden, head_of(self.causal_model))


class AdapterOffPrior(Prior):
    """The base weights under a PEFT adapter: the policy's own model, adapters off. Costs no memory for weights."""

    description = "the base weights (adapters off)"

    def __init__(self, model: nn.Module):
        self.model = model

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        with _inference(self.model), self.model.disable_adapter():
            hidden = self.model(**inputs, final_hidden=True).last_hidden_state
            return PriorStates(hidden, head_of(base_model_of(self.model)))


class SnapshotPrior(Prior):
    """The policy's own model with other values for its trainable parameters: those of an earlier moment.

    Only trainable parameters are copied: for full fine-tuning a second set of weights, under PEFT the adapters alone.
    Their values are exchanged for the time of one forward pass. A parameter must not become trainable later.

    Args:
        model: the policy.
        sync_steps: optimiser steps between two syncs; None keeps the starting weights forever.
        decay: share of the old value that a sync keeps; None or 0 copies.
    """

    def __init__(self, model: nn.Module, sync_steps: int | None = None, decay: float | None = None):
        self.model, self.sync_steps, self.decay = model, sync_steps, decay
        # Small steps of a moving average would be lost in a half-precision value.
        dtypes = {torch.float16: torch.float32, torch.bfloat16: torch.float32} if decay else {}
        self.values = {
            name: value.detach().to(dtypes.get(value.dtype, value.dtype), copy=True)
            for name, value in self._trainable()
        }
        if sync_steps is None:
            self.description = "the starting weights (a frozen copy)"
        else:
            average = f", moving average with decay {decay}" if decay else ""
            self.description = f"the policy's own weights, synced every {sync_steps} optimiser steps{average}"

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        live = {name: parameter.data for name, parameter in self._trainable()}
        try:
            for name, parameter in self._trainable():
                parameter.data = self.values[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._trainable():
                parameter.data = live[name]

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        with _inference(self.model), self._exchanged():
            hidden = self.model(**inputs, final_hidden=True).last_hidden_state
            # Detached inside: the head then keeps the snapshot's values when the live ones return.
            return PriorStates(hidden, head_of(base_model_of(self.model)).detach())

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.sync_steps is None or step % self.sync_steps:
            return
        for name, parameter in self._trainable():
            value = self.values[name]
            value.lerp_(parameter.detach().to(value.dtype), 1 - (self.decay or 0.0))

    def save(self, directory: str | os.PathLike) -> None:
        if self.sync_steps is None:  # starting weights: a resumed run starts from the same ones
            return
        path = Path(directory) / STATE_NAME
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: value.contiguous() for name, value in self.values.items()}, partial)
        os.replace(partial, path)

    def load(self, directory: str | os.PathLike) -> None:
        if self.sync_steps is None:
            return
        path = Path(directory) / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint` has no `{STATE_NAME}`, the weights of the lagged prior: {directory} was "
                "written with another prior. Resume with the prior it was written with, or start a new run from it."
            )
        saved: dict[str, Tensor] = load_file(path)
        if saved.keys() != self.values.keys():
            raise ValueError(
                f"`{path}` holds other parameters than those being trained: resume with the same model and adapters."
            )
        for name, value in saved.items():
            self.values[name].copy_(value)


class SyncPriorCallback(TrainerCallback):
    """Tells a prior about every optimiser step."""

    def __init__(self, prior: Prior):
        self.prior = prior

    def on_step_end(self, args, state, control, **kwargs):
        self.prior.after_step(state.global_step)


def check_reference(config: QTargetConfig, model: Any, ref_model: Any) -> None:
    """Raise early, before any data is prepared, where the configuration and `ref_model` do not fit together."""
    models = [base_model_of(each) for each in (model, ref_model) if isinstance(each, nn.Module)]
    if len(models) == 2 and models[0] is models[1]:
        raise ValueError(
            "`ref_model` is the model being trained, so it would move with it: pass a second instance or a path, or "
            "`ref_model=None` with `prior='base'` for the starting weights."
        )
    if ref_model is None and config.prior_source == "model":
        raise ValueError(
            f"{config.label} needs a reference model and `ref_model` is None: pass a path or a loaded model, or "
            "choose `prior='base'` or `prior='lagged'`."
        )


def uses_reference(config: QTargetConfig) -> bool:
    """Whether a given reference model would serve as the prior."""
    return config.objective(has_prior=True).uses_prior and config.prior_source != "lagged"


def prepare_reference(ref_model: PreTrainedModel, policy: nn.Module) -> None:
    """Freeze a reference model and teach it to hand out hidden states."""
    causal_model = base_model_of(ref_model)
    check_vocabulary(
        "ref_model",
        causal_model.get_output_embeddings().weight.size(0),
        base_model_of(policy).get_output_embeddings().weight.size(0),
    )
    ref_model.requires_grad_(False)
    ref_model.eval()
    add_target_head(causal_model)


def own_prior(config: QTargetConfig, model: nn.Module) -> Prior | None:
    """The prior that the policy's own model can give; None where it is the policy itself, or none is needed.

    `prior="auto"` without a reference model is the base under PEFT and else the policy.
    """
    if not config.objective(has_prior=True).uses_prior:
        return None
    source = config.prior_source
    if source == "lagged":
        return SnapshotPrior(model, config.sync_steps, config.prior_sync_decay)
    if is_peft_model(model):
        return AdapterOffPrior(model)
    return SnapshotPrior(model) if source == "base" else None
