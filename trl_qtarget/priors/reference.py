"""Another model as the prior, a reference model or a teacher: how it is loaded, frozen and placed."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from ..loss.head import PriorStates, add_target_head, check_head, head_of
from ..target.checks import check_vocabulary
from .base import Prior, base_model_of
from .loading import reference_options
from .shards import reshard, whole_shape


class ModelPrior(Prior):
    """Another model. `model` is `causal_model` in its wrapper."""

    def __init__(self, model: nn.Module, causal_model: PreTrainedModel):
        self.model, self.causal_model = model, causal_model

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        with torch.no_grad():
            hidden = self.model(**inputs, final_hidden=True).last_hidden_state
        reshard(self.causal_model)
        return PriorStates(hidden, partial(head_of, self.causal_model))

    def fixed_parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.causal_model)
        return dict(self.causal_model.named_parameters())


def load_reference(
    path: str, policy: PreTrainedModel, args: SFTConfig, accelerator: Accelerator, same_model: bool = False
) -> PreTrainedModel:
    """Load a reference model in the policy's dtype, by those of the policy's options that say nothing of which model.

    The `same_model` takes all of them. Code of another model's repository is not run: load such a model yourself.
    """
    given = args.model_init_kwargs or {}
    own = {"trust_remote_code": args.trust_remote_code} | given if same_model else reference_options(given)
    options = {"dtype": policy.dtype} | own
    if accelerator.num_processes > 1:
        options["device_map"] = None
    return create_model_from_path(path, **options)


def freeze(
    ref_model: PreTrainedModel, policy: nn.Module, accelerator: Accelerator
) -> tuple[nn.Module, PreTrainedModel]:
    """Freeze a reference model, teach it to hand out hidden states, and shard it where the policy is sharded.

    Returns:
        The model in its wrapper, and the causal language model inside.
    """
    causal_model = base_model_of(ref_model)
    add_target_head(causal_model)
    vocabularies = [
        whole_shape(each.get_output_embeddings().weight)[0] for each in (causal_model, base_model_of(policy))
    ]
    check_vocabulary("ref_model", *vocabularies)
    ref_model.requires_grad_(False)
    ref_model.eval()
    placed = _place(ref_model, accelerator)
    check_head(causal_model)
    return placed, causal_model


def _place(ref_model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    # bitsandbytes weights cannot be cut into shards, so each rank has the whole of a quantised model.
    if not getattr(ref_model, "is_quantized", False):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return prepare_deepspeed(ref_model, accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            # Layer by layer, as the policy is. `Accelerator.prepare_model` would leave it whole on every rank.
            return fsdp2_prepare_model(accelerator, ref_model)
    return accelerator.prepare_model(ref_model, evaluation_mode=True)
