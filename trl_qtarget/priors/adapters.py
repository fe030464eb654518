"""PEFT's adapters: which parameters are theirs, and whether they have been trained already."""

import logging

import torch
from accelerate.utils import is_peft_model
from torch import nn

from ..loss.body import inference
from .shards import in_zero3, share


_logger = logging.getLogger(__name__)

# Where PEFT keeps what it has found, inside a layer of its own.
_FOUND = {"base_layer", "original_module"}


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of a PEFT model that its base has not, and that are out of use when adapters are off."""
    if not is_peft_model(model):
        return frozenset()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    added = {id(value) for value in getattr(model, "prompt_encoder", nn.Module()).parameters()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = module.named_parameters(remove_duplicate=False)
            added |= {id(value) for name, value in inside if _FOUND.isdisjoint(name.split("."))}
    return frozenset(name for name, value in model.named_parameters() if id(value) in added)


@torch.no_grad()
def are_trained(model: nn.Module) -> bool:
    """Whether the adapters of a PEFT model, before it is wrapped, change what it says: new ones do not.

    The prompts of prompt learning always do. Of weights that are sharded only LoRA's are looked at.
    """
    if model.active_peft_config.is_prompt_learning:
        return True
    if in_zero3(model) or any(value.is_meta for value in model.parameters()):
        return any(share(value).any() for name, value in model.named_parameters() if "lora_B" in name)
    embeddings = model.get_input_embeddings().weight
    inputs = {"input_ids": torch.arange(min(8, len(embeddings)), device=embeddings.device)[None], "use_cache": False}
    try:
        with inference(model):
            adapted = model(**inputs).logits
            with model.disable_adapter():
                base = model(**inputs).logits
    except Exception as error:  # a model that wants other inputs
        _logger.debug(f"Whether the adapters of {type(model).__name__} have been trained is not known: {error}")
        return False
    # Some new adapters multiply by a rounded one, in every layer.
    rounding = torch.finfo(base.dtype).eps ** 0.5 * base.float().std()
    return bool((adapted - base).abs().max() > rounding)
