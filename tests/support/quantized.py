"""Tiny models in the formats of bitsandbytes, which computes NF4 and int8 on a CPU too."""

import atexit
import functools
import tempfile
from collections.abc import Callable

import tiny
import torch
from training import warm_model
from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    """4-bit weights whose constants are quantised once more."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def int8() -> BitsAndBytesConfig:
    """8-bit weights and inputs."""
    # The outlier columns that a threshold picks are those of the whole batch: then a row's result would depend on
    # which other rows it is computed with, and so on the number of processes.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


FORMATS = {"nf4": nf4, "int8": int8}


def wide() -> PreTrainedModel:
    """A Llama whose widths are multiples of 64: on a CPU, bitsandbytes asks for that."""
    return tiny.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4)


def plain(steps: int = 20) -> PreTrainedModel:
    """The unquantised model, warmed up for `steps`."""
    return warm_model(wide, steps)


@functools.cache
def folder(steps: int = 20, form: str | None = None) -> str:
    """A checkpoint of `plain(steps)`, quantised if a format is named; gone when the process ends."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    (quantized(form, steps) if form else plain(steps)).save_pretrained(directory.name)
    tiny.tokenizer().save_pretrained(directory.name)
    return directory.name


def quantized(form: str, steps: int = 20) -> PreTrainedModel:
    """`plain(steps)` in a format of `FORMATS`. Nothing is written: in a distributed job only one rank would do so."""
    config: Callable[[], BitsAndBytesConfig] = FORMATS[form]
    model = plain(steps)
    return type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization_config=config(), dtype=torch.float32
    )


def full_precision(policy: PreTrainedModel) -> None:
    """Adapters and products of a quantised policy in float32, so that two runs do not differ by roundings."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # TRL's choice is bfloat16
    # On a CPU that has instructions for bfloat16, bitsandbytes would evaluate in it, from 4-bit weights that it packs
    # anew. No gradient passes through those in the next training step, and ZeRO-3 would not know them in its shares.
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
