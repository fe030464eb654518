"""Which of the options that load the policy also load a reference model."""

from collections.abc import Mapping
from typing import Any


# How weights are fetched, in which precision, where they lie and what computes attention: nothing that says which
# model it is. All else (a revision, a configuration or fields of one, weights, quantisation) is the policy's alone.
SHARED_OPTIONS = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
    "device_map",
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


def reference_options(policy_options: Mapping[str, Any] | None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Options of `from_pretrained` for another model than the policy.

    Args:
        policy_options: those of the policy (`model_init_kwargs`); of them, `SHARED_OPTIONS` are taken over.
        trust_remote_code: whether the reference model's own repository may run code. That the policy's may does not
            count.
    """
    shared = {name: value for name, value in (policy_options or {}).items() if name in SHARED_OPTIONS}
    return shared | {"trust_remote_code": trust_remote_code}
