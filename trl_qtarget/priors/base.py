"""Where the prior's hidden states come from: another model, the base under the adapters, or earlier weights.

All priors see the very inputs of the policy (packed position ids, images), run without gradients, dropout or gradient
checkpointing, and hand out hidden states and a head; the fused loss does the rest.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..loss.head import PriorStates, head_of
from .shards import reshard


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def virtual_tokens(model: nn.Module) -> int:
    """How many positions PEFT's prompt learning puts before the text; prefix tuning puts none there."""
    if not is_peft_model(model) or not model.active_peft_config.is_prompt_learning:
        return 0
    config = model.active_peft_config
    return 0 if config.peft_type == "PREFIX_TUNING" else config.num_virtual_tokens


def backbone_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Final hidden states `[B, T, H]` by the backbone alone, past the wrapper's forward and its virtual tokens."""
    return base_model_of(model).base_model(**dict(inputs, use_cache=False)).last_hidden_state


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
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

    def request(self, inputs: Mapping[str, Any]) -> Callable[[], PriorStates]:
        """What the policy's forward calls for the states. Here the prior has run by then."""
        states = self.states(inputs)
        return lambda: states

    def start(self, step: int) -> None:
        """Told when training begins, with every wrapper in place; `step` is 0 unless a run is resumed."""

    def after_step(self, step: int) -> None:
        """Told after every optimiser step; `step` counts from 1."""

    def save(self, directory: str | os.PathLike, should_save: bool) -> None:
        """Write into a checkpoint what a resumed run cannot reconstruct. Every rank calls it, `should_save` writes."""

    def load(self, directory: str | os.PathLike) -> None:
        """Read what `save` wrote."""


class ModelPrior(Prior):
    """Another model: a reference model, a teacher, or a frozen copy. `model` is `causal_model` in its wrapper."""

    def __init__(self, model: nn.Module, causal_model: PreTrainedModel, description: str = "the reference model"):
        self.model, self.causal_model, self.description = model, causal_model, description

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        with torch.no_grad():
            hidden = self.model(**inputs, final_hidden=True).last_hidden_state
        reshard(self.causal_model)
        return PriorStates(hidden, partial(head_of, self.causal_model))


class AdapterOffPrior(Prior):
    """The base weights under a PEFT adapter: the policy's own model, adapters off. Costs no memory for weights."""

    description = "the base weights (adapters off)"

    def __init__(self, model: nn.Module):
        self.model = model

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        with inference(self.model), self.model.disable_adapter():
            hidden = backbone_states(self.model, inputs)
            head = head_of(base_model_of(self.model))
        return PriorStates(hidden, lambda: head)

    def request(self, inputs: Mapping[str, Any]) -> Callable[[], PriorStates]:
        # It runs within the policy's forward. So ZeRO-3 sees one pass whose order of modules never changes: a pass of
        # its own would invalidate the recorded order, and with it the prefetching, in every step.
        return partial(self.states, inputs)
