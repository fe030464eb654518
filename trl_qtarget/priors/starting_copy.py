"""The starting weights as the prior: a frozen copy of a policy that has no adapters."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from ..loss.request import PriorStates
from .reference import ModelPrior


class StartingCopyPrior(ModelPrior):
    """A frozen copy of the policy's starting weights. It shares with the policy what is frozen, until it is thawed.

    Args:
        model: the copy in its wrapper.
        causal_model: the copy.
        policy: whose copy it is.
    """

    def __init__(self, model: nn.Module, causal_model: PreTrainedModel, policy: nn.Module):
        super().__init__(model, causal_model, "model")
        self.policy = policy

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        # Nothing of the copy is trainable but what it shares.
        self._replace({value: _clone(value) for value in self.causal_model.parameters() if value.requires_grad})
        return super().states(inputs)

    def _told_apart_by_rows(self) -> bool:
        return False  # as the policy reads them

    @contextmanager
    def policy_loads(self) -> Iterator[None]:
        """Nothing is shared meanwhile; afterwards only what had not been thawed when the checkpoint was written."""
        policy = set(self.policy.parameters())
        shared = [value for value in self.causal_model.parameters() if value in policy and value.is_floating_point()]
        own = {value: _clone(value) for value in shared}
        self._replace(own)
        yield
        self._replace({mine: value for value, mine in own.items() if torch.equal(mine, value)})

    def _replace(self, parameters: Mapping[nn.Parameter, nn.Parameter]) -> None:
        for module in self.causal_model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if value in parameters:
                    setattr(module, name, parameters[value])


def _clone(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


def starting_copy(policy: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """A second set of the policy's weights, of before any training. Frozen ones are shared where none is sharded."""
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    shared = [] if sharded else [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    return copy.deepcopy(policy, {id(parameter): parameter for parameter in shared})
