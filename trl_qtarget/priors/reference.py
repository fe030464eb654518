"""Another model as the prior, a reference model or a teacher: how it is loaded, frozen and placed."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import PreTrainedModel, TrainingArguments

from ..loss.head import add_target_head, check_head, head_of
from ..loss.request import PriorStates
from .base import Prior, base_model_of
from .documents import accepted, has_documents, mixes_documents, states_of_documents
from .fit import Positions
from .loading import load_causal_model, policy_options, reference_options
from .shards import in_fsdp2, in_zero3, reshard
from .tokens import ReadableIds


class ModelPrior(Prior):
    """Another model.

    Args:
        model: the model in its wrapper.
        causal_model: the model itself.
        name: of the argument that gave it.
        ids: how it reads the policy's ids, where it has fewer.
    """

    def __init__(
        self,
        model: nn.Module,
        causal_model: PreTrainedModel,
        name: str = "ref_model",
        ids: ReadableIds | None = None,
    ):
        self.model, self.causal_model, self._ids = model, causal_model, ids
        self._positions = Positions(causal_model, name)
        self._mixes_documents: bool | None = None  # until it is measured

    def states(self, inputs: Mapping[str, Any]) -> PriorStates:
        self._positions.check(inputs)
        inputs = inputs if self._ids is None else self._ids.of(inputs)
        if has_documents(inputs) and self._told_apart_by_rows():
            at_once = in_zero3(self.causal_model) or in_fsdp2(self.causal_model)
            hidden = states_of_documents(self._run, inputs, at_once)
        else:
            hidden = self._run(**inputs)
        return PriorStates(hidden, partial(head_of, self.causal_model))

    def keep_rows(self, packed: bool) -> None:
        """Have every batch run as it comes: where sequences are split over ranks, none has whole documents.

        Raises:
            ValueError: rows hold several documents, and the model does not tell them apart by their positions.
        """
        if packed and self._told_apart_by_rows():
            raise ValueError(
                "`ref_model` does not tell documents apart by their positions, and under sequence parallelism packed "
                "rows cannot be taken apart for it: set `packing=False` and `padding_free=False`."
            )
        self._mixes_documents = False

    def _told_apart_by_rows(self) -> bool:
        if self._mixes_documents is None:
            self._mixes_documents = mixes_documents(self.causal_model, self._run)
        return self._mixes_documents

    def _run(self, **inputs: Any) -> Tensor:
        with torch.no_grad():
            inputs = accepted(self.causal_model, inputs)
            hidden = self.model(**inputs, final_hidden=True).last_hidden_state
        reshard(self.causal_model)
        return hidden

    def fixed_parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.causal_model)
        return dict(self.causal_model.named_parameters())


def load_reference(
    path: str, policy: PreTrainedModel, args: TrainingArguments, accelerator: Accelerator, same_model: bool = False
) -> PreTrainedModel:
    """Load a reference model in the policy's dtype, by those of the policy's options that say nothing of which model.

    The `same_model` takes all of them. Code of another model's repository is not run: load such a model yourself.
    """
    given = policy_options(args)
    own = reference_options(given)
    if same_model:
        own = {"trust_remote_code": getattr(args, "trust_remote_code", False)} | given
    options = {"dtype": policy.dtype} | own
    if accelerator.num_processes > 1:
        options["device_map"] = None
    return load_model(path, options)


def load_model(path: str, options: Mapping[str, Any]) -> nn.Module:
    """A causal language model by its path; of an adapter's folder its base, by the same options, with the adapter."""
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return load_causal_model(path, **options)
    from peft import PeftConfig, PeftModel  # not needed by anything else

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ValueError(
            f"`ref_model` ({path}) is the folder of an adapter that does not say of which model: load the model, put "
            "the adapter on it with `PeftModel.from_pretrained`, and pass that."
        )
    without_revision = {name: value for name, value in options.items() if name != "revision"}
    return PeftModel.from_pretrained(load_causal_model(base, **without_revision), path)


def freeze(ref_model: PreTrainedModel, accelerator: Accelerator) -> tuple[nn.Module, PreTrainedModel]:
    """Freeze a reference model, teach it to hand out hidden states, and shard it where the policy is sharded.

    Returns:
        The model in its wrapper, and the causal language model inside.
    """
    causal_model = base_model_of(ref_model)
    add_target_head(causal_model)
    ref_model.requires_grad_(False)
    ref_model.eval()
    placed = _place(ref_model, accelerator)
    check_head(causal_model)
    return placed, causal_model


def _place(ref_model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    # bitsandbytes weights cannot be cut into shards, so each rank has the whole of a quantised model.
    if not getattr(ref_model, "is_quantized", False):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return _in_deepspeed(ref_model, accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            if accelerator.parallelism_config is not None and accelerator.parallelism_config.cp_enabled:
                _attach_context_parallel_hooks(ref_model)
            # Layer by layer, as the policy is. `Accelerator.prepare_model` would leave it whole on every rank.
            with _own_layers(accelerator.state.fsdp_plugin, ref_model):
                return fsdp2_prepare_model(accelerator, ref_model)
    return accelerator.prepare_model(ref_model, evaluation_mode=True)


def _in_deepspeed(ref_model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """A model in an engine of its own that trains nothing: sharded by ZeRO-3, whole on every rank by the others."""
    import deepspeed  # not needed by anything else

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    zero = config["zero_optimization"]
    # Without an optimiser these have nothing to work on, and DeepSpeed would fail on them.
    for options, name in ((config, "optimizer"), (config, "scheduler"), (zero, "offload_optimizer")):
        options.pop(name, None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    engine, *_ = deepspeed.initialize(model=ref_model, config=config)
    engine.eval()  # which returns nothing
    return engine


@contextmanager
def _own_layers(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> Iterator[None]:
    """Inside this context Accelerate wraps the layers of this model, whatever those of the policy are called."""
    former = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    policy, names = former
    if getattr(policy, "func", policy) is transformer_auto_wrap_policy:
        known = [name for name in names or () if get_module_class_from_name(model, name) is not None]
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, known or None
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = former
