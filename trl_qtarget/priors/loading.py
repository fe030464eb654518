"""A model by its path, and which of the options that load the policy also load a reference model."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments


# How weights are fetched, in which precision, where they lie, in which shards, and what computes attention: nothing
# that says which model it is. All else (a revision, a configuration or fields of one, weights, quantisation) is the
# policy's alone.
SHARED_OPTIONS = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
    "device_map",
    "distributed_config",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "low_cpu_mem_usage",
    "cache_dir",
    "token",
    "proxies",
    "local_files_only",
    "force_download",
    "use_safetensors",
)


def policy_options(args: TrainingArguments) -> Mapping[str, Any]:
    """Options of `from_pretrained` that load the policy: an `SFTConfig` has them, other arguments have none."""
    return getattr(args, "model_init_kwargs", None) or {}


def load_causal_model(path: str, **options: Any) -> PreTrainedModel:
    """A language model with the class that its configuration names, of text or of text and images.

    Args:
        path: a folder, or an id of the hub.
        options: of `from_pretrained`. The dtype is float32 unless one is given, and may be a string. On an
            accelerator the model is put there (`device_map="auto"`) unless a device map is given.
    """
    dtype = options.get("dtype", "float32")
    options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    options.setdefault("device_map", None if PartialState().device.type in ("cpu", "mps") else "auto")
    config = AutoConfig.from_pretrained(path, trust_remote_code=options.get("trust_remote_code", False))
    named = (config.architectures or [""])[0]
    # Code of a repository names classes that transformers has not.
    return getattr(transformers, named, AutoModelForCausalLM).from_pretrained(path, **options)


def reference_options(policy_options: Mapping[str, Any] | None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Options of `from_pretrained` for another model than the policy.

    Args:
        policy_options: those of the policy (`model_init_kwargs`); of them, `SHARED_OPTIONS` are taken over.
        trust_remote_code: whether the reference model's own repository may run code. That the policy's may does not
            count.
    """
    shared = {name: value for name, value in (policy_options or {}).items() if name in SHARED_OPTIONS}
    return shared | {"trust_remote_code": trust_remote_code}
