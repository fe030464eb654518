"""The contract of a prior: where its hidden states come from, and when it is told of a step.

All priors see the very inputs of the policy (packed position ids, images), run without gradients, dropout or gradient
checkpointing, and hand out hidden states and a head; the fused loss does the rest.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ..loss.head import final_hidden_states
from ..loss.request import PriorStates


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def virtual_tokens(model: nn.Module) -> int:
    """How many positions PEFT's prompt learning puts before the text; prefixes and cartridges put none there."""
    if not is_peft_model(model) or not model.active_peft_config.is_prompt_learning:
        return 0
    config = model.active_peft_config
    return 0 if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") else config.num_virtual_tokens


def backbone_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Final hidden states `[B, T, H]` of the model alone, past the wrapper's forward and its virtual tokens."""
    return final_hidden_states(base_model_of(model), **inputs)


class Prior:
    """A frozen or slowly moving distribution."""

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        """Hidden states and head for the policy's inputs (labels and loss arguments are left out)."""
        raise NotImplementedError

    def request(self, inputs: Mapping[str, Any]) -> Callable[[], PriorStates]:
        """What the policy's forward calls for the states. Here the prior has run by then."""
        states = self.states(inputs)
        return lambda: states

    @contextmanager
    def policy_loads(self) -> Iterator[None]:
        """Around the moment in which a resumed run loads the policy's weights from a checkpoint."""
        yield

    def start(self, step: int) -> None:
        """Told when training begins, with every wrapper in place; `step` is 0 unless a run is resumed."""

    def after_step(self, step: int) -> None:
        """Told after every optimiser step; `step` counts from 1."""

    def fixed_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this prior reads and that no training changes, by name."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike, should_save: bool) -> None:
        """Write into a checkpoint what a resumed run cannot reconstruct. Every rank calls it, `should_save` writes."""

    def load(self, directory: str | os.PathLike) -> None:
        """Read what `save` wrote."""


class PriorCallback(TrainerCallback):
    """Tells a prior when training begins, and about every optimiser step."""

    def __init__(self, prior: Prior):
        self.prior = prior

    def on_train_begin(self, args, state, control, **kwargs):
        self.prior.start(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.prior.after_step(state.global_step)
