"""To inspect is to be a guest: the models, the random numbers and Accelerate's state are left as they were found."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.state import AcceleratorState
from torch import nn

from ..loss.head import CHANGED
from ..priors.base import base_model_of
from ..priors.loading import load_causal_model


def load_policy(name: str, **options: Any) -> nn.Module:
    """The model of a path or id; one with adapters keeps them apart, for the base under them is a prior."""
    if (Path(name) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(name, **options)
    return load_causal_model(name, **options)


def precision() -> dict[str, bool]:
    """`bf16` and `fp16` of an `SFTConfig` that agrees with what Accelerate has been told already, if it has."""
    told = AcceleratorState._shared_state.get("_mixed_precision")
    return {"bf16": told == "bf16", "fp16": told == "fp16"}


@contextmanager
def no_trace(*models: Any) -> Iterator[None]:
    """Afterwards no model has another `forward` or tag, random numbers go on, and any precision can be chosen."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    states = random.getstate(), numpy.random.get_state()
    initialized = bool(AcceleratorState._shared_state)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(_own_forward(base_model_of(model)))
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            if not initialized:
                AcceleratorState._reset_state()


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    former = {name: vars(model).get(name) for name in CHANGED}
    tags = vars(model).get("model_tags")
    former["model_tags"] = None if tags is None else list(tags)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                vars(model).pop(name, None)
            else:
                setattr(model, name, value)
