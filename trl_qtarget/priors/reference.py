"""Reference models: which one a target needs, how it is loaded, and how it is placed beside the policy."""

import copy
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from ..loss.head import add_target_head
from ..target.checks import check_vocabulary
from ..target.config import QTargetConfig
from .base import ModelPrior, base_model_of
from .shards import in_zero3, whole_shape


# Of PEFT's LoRA: what each puts into the adapter, it takes from the weights.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_reference(config: QTargetConfig, model: Any, ref_model: Any) -> None:
    """Raise early, before any data is prepared, where the configuration and `ref_model` do not fit together."""
    if not isinstance(ref_model, str | nn.Module | None):
        raise ValueError(f"`ref_model` must be a path or a loaded model, got `{type(ref_model).__name__}`.")
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


def check_base(model: nn.Module) -> None:
    """Raise where the weights under a PEFT adapter are not those of a model of their own."""
    for name, config in model.peft_config.items():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
            raise ValueError(
                f"`init_lora_weights={init!r}` of the adapter {name!r} moves a part of the base weights into the "
                "adapter, so the model without it is not the base model: pass the base model's path as `ref_model`, "
                "or choose another initialisation, or `prior='policy'`."
            )


def load_reference(
    path: str, policy: PreTrainedModel, args: SFTConfig, accelerator: Accelerator, same_model: bool = False
) -> PreTrainedModel:
    """Load a reference model with the policy's options and in its dtype; the `same_model` in its revision too."""
    options = {"dtype": policy.dtype, "trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs or {}
    if not same_model:
        for of_the_policy_alone in ("quantization_config", "revision"):
            options.pop(of_the_policy_alone, None)
    if accelerator.num_processes > 1:
        options["device_map"] = None
    return create_model_from_path(path, **options)


def starting_copy(policy: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """A second set of the policy's weights, of before any training. Frozen ones are shared where none is sharded."""
    if in_zero3(policy):
        raise ValueError(
            "`prior='base'` copies the starting weights, and ZeRO-3 has already sharded those of `model`: pass a path "
            "as `model`, or the path of the starting weights as `ref_model`."
        )
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    shared = [] if sharded else [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    model = copy.deepcopy(policy, {id(parameter): parameter for parameter in shared})
    vars(model).pop("forward", None)  # a replaced forward would still run the policy
    return model


def reference_prior(
    ref_model: PreTrainedModel, policy: nn.Module, accelerator: Accelerator, description: str = "the reference model"
) -> ModelPrior:
    """Freeze a reference model, teach it to hand out hidden states, and shard it where the policy is sharded."""
    causal_model = base_model_of(ref_model)
    vocabularies = [
        whole_shape(each.get_output_embeddings().weight)[0] for each in (causal_model, base_model_of(policy))
    ]
    check_vocabulary("ref_model", *vocabularies)
    ref_model.requires_grad_(False)
    ref_model.eval()
    add_target_head(causal_model)
    return ModelPrior(_place(ref_model, accelerator), causal_model, description)


def _place(ref_model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    # bitsandbytes weights cannot be cut into shards, so each rank has the whole of a quantised model.
    if not getattr(ref_model, "is_quantized", False):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return prepare_deepspeed(ref_model, accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            # Layer by layer, as the policy is. `Accelerator.prepare_model` would leave it whole on every rank.
            return fsdp2_prepare_model(accelerator, ref_model)
    return accelerator.prepare_model(ref_model, evaluation_mode=True)
