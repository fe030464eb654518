"""What one rank holds of a parameter: all of it, or its share under ZeRO-3 and FSDP2.

With them a second set of weights costs no more than the first: each rank stores, averages and exchanges its own part,
and nothing is whole but what is in use.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def _in_zero3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def in_zero3(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded a model."""
    return any(map(_in_zero3, model.parameters()))


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is in shards already, before any trainer: by ZeRO-3, or by transformers as it was loaded."""
    return any(_in_zero3(value) or isinstance(value, DTensor) for value in model.parameters())


def in_fsdp2(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that ZeRO-3 has sharded."""
    return parameter.ds_shape if _in_zero3(parameter) else parameter.shape


def share(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter, as the optimiser updates it. Under ZeRO-3 it is flat and may be padded."""
    if _in_zero3(parameter):
        return parameter.ds_tensor.data
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return parameter.data


def gather(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The whole tensor of which every rank holds a part, laid out as `parameter` is. Every rank has to call it."""
    if _in_zero3(parameter):
        group = parameter.ds_process_group
        flat = part.new_empty(part.numel() * dist.get_world_size(group))
        dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        layout = (parameter.device_mesh, parameter.placements)
        sizes = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(part, *layout, run_check=False, **sizes).full_tensor()
    return part


def scatter(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """The inverse of `gather`: this rank's part of a tensor that every rank has whole."""
    if _in_zero3(parameter):
        part = torch.zeros_like(parameter.ds_tensor, dtype=whole.dtype)
        start = part.numel() * dist.get_rank(parameter.ds_process_group)
        mine = whole.flatten()[start : start + part.numel()]
        part[: mine.numel()] = mine
        return part
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return whole.to(parameter.device)


def _put(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Make `part` the rank's share of a parameter that no wrapper holds whole; returns the share it had."""
    if isinstance(parameter, DTensor):
        # FSDP2 keeps its own views of this memory, so the values move, not the tensors.
        local = parameter.to_local().detach()
        former = local.clone()
        local.copy_(part)
        return former
    holder = parameter.ds_tensor if _in_zero3(parameter) else parameter
    former = holder.data
    holder.data = part.to(former)
    return former


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 still holds whole after a forward pass: the head, and all that the root module owns."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _release(model: nn.Module, wrapped: nn.Module) -> None:
    """Give back what a wrapper still holds whole, so that the next use gathers the shares again."""
    reshard(model)
    if in_zero3(model):
        wrapped.optimizer.empty_partition_cache()


@contextmanager
def exchanged(model: nn.Module, wrapped: nn.Module, parts: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside this context the named parameters have other values; `wrapped` is the model in its wrapper."""
    _release(model, wrapped)  # first: until then, some of the parameters may be whole ones in the place of the shares
    parameters = {name: value for name, value in model.named_parameters() if name in parts}
    former = {name: _put(value, parts[name]) for name, value in parameters.items()}
    # Autocast keeps a parameter's cast by the parameter, whose other values it would be taken for.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        _release(model, wrapped)
        for name, value in parameters.items():
            _put(value, former[name])
        torch.clear_autocast_cache()
