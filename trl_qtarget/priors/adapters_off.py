"""The base under PEFT adapters as the prior: the policy's own model, once more, without them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..loss.head import PriorStates, head_of
from .base import Prior, backbone_states, base_model_of, inference


class AdapterOffPrior(Prior):
    """The base weights under a PEFT adapter: the policy's own model, adapters off. Costs no memory for weights."""

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
