"""Refusals on two ranks at once: `torchrun --nproc_per_node 2 refused.py outcomes.json`.

Started by a launcher that splits rows over the ranks, it runs the cases of `SPLIT_CASES`, otherwise those of `CASES`:
every one has to raise a ValueError on both ranks. Whoever waits for a rank that has raised gets an error
of gloo's in its place, after `_PATIENCE` seconds.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from training import sft_config, warm_model
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


_PATIENCE = 20
_SPLIT = "PARALLELISM_CONFIG_SP_SIZE" in os.environ


def _rows(**columns: Any) -> Dataset:
    ids = [tiny.tokenizer()(text)["input_ids"] for text in tiny.sentences(6, seed=1)]
    return Dataset.from_dict({"input_ids": ids} | {name: make(ids) for name, make in columns.items()})


def _trainer(
    method: Any = "sft",
    dataset: Dataset | None = None,
    *,
    model: Any = None,
    trainer: type = QTargetSFTTrainer,
    options: dict[str, Any] | None = None,
    **given: Any,
) -> QTargetSFTTrainer:
    return trainer(
        model or warm_model(),
        sft_config(**{"max_steps": 1} | (options or {})),
        train_dataset=_rows() if dataset is None else dataset,
        processing_class=tiny.tokenizer(),
        qtarget_config=method,
        **given,
    )


def _weights(change: Callable[[list[float]], list[float]]) -> Dataset:
    return _rows(token_weights=lambda ids: [change([1.0] * len(row)) for row in ids])


class _FSDP1(QTargetSFTTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)


def _resume(folder: str) -> None:
    first = _trainer("dft", options={"output_dir": folder, "save_strategy": "steps", "save_steps": 1})
    first.train()
    _again()
    _trainer("asft", ref_model=warm_model(), options={"output_dir": folder}).train(resume_from_checkpoint=True)


def _again() -> None:
    AcceleratorState._reset_state(reset_partial_state=_SPLIT)


def _cases(folder: str) -> dict[str, Callable[[], Any]]:
    policy = warm_model()
    lora = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    return {
        "unknown method": partial(_trainer, "dpo"),
        "no prior": partial(_trainer, {"method": "asft", "prior": "policy"}),
        "no reference": partial(_trainer, "distill"),
        "no column": partial(_trainer, "cft"),
        "negative weight": partial(_trainer, "cft", _weights(lambda row: [-1.0, *row[1:]])),
        "missing weight": partial(_trainer, "cft", _weights(lambda row: row[1:])),
        "no length to pack to": partial(
            _trainer, "cft", _weights(lambda row: row), options={"packing": True, "max_length": None}
        ),
        "no such reference": partial(_trainer, "distill", ref_model=folder + "/nowhere"),
        "reference is the policy": partial(_trainer, "distill", model=policy, ref_model=policy),
        "adapter on the head": partial(_trainer, "asft", peft_config=lora),
        "no such cache": partial(_trainer, "distill", prior_cache=folder + "/nowhere"),
        "FSDP1": partial(_trainer, trainer=_FSDP1),
        "another target": partial(_resume, folder + "/resumed"),
        "knob without data": lambda: _trainer(
            QTargetConfig("adaptive_sft", prior="policy"),
            _rows(labels=lambda ids: [[row[0]] + [-100] * (len(row) - 1) for row in ids]),
        ).train(),
    }


def _split_cases(folder: str) -> dict[str, Callable[[], Any]]:
    """By what they are refused with."""

    def llama(**changes: Any) -> LlamaForCausalLM:
        return LlamaForCausalLM(type(sizes).from_dict(sizes.to_dict() | changes))

    sizes = warm_model().config
    kept = {name: getattr(sizes, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    windows = MistralForCausalLM(MistralConfig(**kept, num_hidden_layers=1, intermediate_size=32, sliding_window=8))
    eager = llama()
    eager.set_attn_implementation("eager")
    tokens = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    two_rows = {"padding_free": True, "max_length": None, "per_device_train_batch_size": 2}
    other_heads = llama(num_attention_heads=1, num_key_value_heads=1)
    return {
        "`peft_config` is of prompt learning": partial(_trainer, peft_config=tokens),
        "`model` has layers of the kind sliding_attention": partial(_trainer, model=windows),
        "`per_device_train_batch_size=2`": partial(_trainer, options=two_rows),
        "`ref_model` has (1, 1, 4) for num_attention_heads": partial(_trainer, "distill", ref_model=other_heads),
        "`ref_model` computes attention by 'eager'": partial(_trainer, "distill", ref_model=eager),
        "nowhere": partial(_trainer, "distill", ref_model=folder + "/nowhere"),
    }


CASES, SPLIT_CASES = tuple(_cases("")), tuple(_split_cases(""))


def main(file: str) -> None:
    datasets.disable_progress_bars()
    patience = timedelta(seconds=_PATIENCE)
    if _SPLIT:
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=patience)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        dist.init_process_group("gloo", timeout=patience)
        PartialState(cpu=True)
    shared: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    outcomes: dict[str, list[str]] = {}
    for name, case in (_split_cases if _SPLIT else _cases)(shared[0]).items():
        _again()
        try:
            case()
            said = "nothing was raised"
        except (ValueError, OSError) as error:
            said = f"refused: {error}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        every: list[Any] = [None, None]
        dist.all_gather_object(every, said)
        outcomes[name] = every
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
