"""The training script behind `trl-qtarget sft`; `python -m trl_qtarget.cli.sft` runs it in this process.

It is `trl sft` with `QTargetSFTTrainer`: every argument of that script, every field of `QTargetConfig`, and a
reference model with how to load it.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, load_dataset
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.trainer.utils import create_model_from_path

from ..priors.loading import reference_options
from ..target.config import QTargetConfig
from ..training.trainer import QTargetSFTTrainer


logger = logging.getLogger("trl_qtarget")

# Loaders of `datasets`, by the ending of a local file.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


@dataclass
class ReferenceArguments:
    """A reference model or teacher, and how to load it."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reference model or teacher: path or hub id. It must have the policy's vocabulary."},
    )
    ref_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the reference model."})
    ref_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the reference model's weights. None: the policy's.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    ref_load_in_4bit: bool = field(default=False, metadata={"help": "Load the reference model in 4 bits (NF4)."})
    ref_load_in_8bit: bool = field(default=False, metadata={"help": "Load the reference model in 8 bits."})
    ref_attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the reference model. None: the policy's."}
    )
    ref_trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code of the reference model's repository. The policy's `trust_remote_code` does not."},
    )

    def __post_init__(self):
        if self.ref_load_in_4bit and self.ref_load_in_8bit:
            raise ValueError("`ref_load_in_4bit` and `ref_load_in_8bit` exclude each other: set one of them.")
        given = [name for name in vars(self) if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if given and self.ref_model_name_or_path is None:
            raise ValueError(
                f"`{given[0]}` says how to load a reference model: name it with `ref_model_name_or_path`."
            )


def make_parser(prog: str | None = None) -> TrlParser:
    """Parser of every argument; YAML by `--config`, with the command line winning."""
    return TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, QTargetConfig, ReferenceArguments), prog=prog
    )


def main(arguments: Sequence[str]) -> None:
    """Train, save and, if asked, push."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)  # it says which prior was chosen
    parsed = make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False)
    script, training, model, mixture, target, reference = parsed
    training.model_init_kwargs = {**init_kwargs(model, training), **(training.model_init_kwargs or {})}
    dataset = load_data(script, mixture)
    trainer = QTargetSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=split_of(dataset, script.dataset_train_split, "dataset_train_split"),
        eval_dataset=(
            None
            if training.eval_strategy == "no"
            else split_of(dataset, script.dataset_test_split, "dataset_test_split")
        ),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        qtarget_config=target_of(arguments, target),
        ref_model=load_reference(reference, training),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Saved to {training.output_dir}.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.accelerator.wait_for_everyone()  # rank 0 is still writing; who left before would look like a failure
    trainer.accelerator.end_training()


def init_kwargs(model: ModelConfig, training: SFTConfig) -> dict[str, Any]:
    """How the policy is loaded."""
    return {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }


def target_of(arguments: Sequence[str], target: QTargetConfig) -> QTargetConfig | None:
    """The target that was asked for; None without a word about it: then TRL's own `loss_type` may name one."""
    return target if target != QTargetConfig() or names_method(arguments) else None


def names_method(arguments: Sequence[str]) -> bool:
    """Whether the command line or its YAML file names a method, be it the default one."""
    if any(item.partition("=")[0] == "--method" for item in arguments):
        return True
    if "--config" not in arguments:
        return False
    path = Path(arguments[list(arguments).index("--config") + 1])
    return "method" in yaml.safe_load(path.read_text(encoding="utf-8"))


# --- data ---


def load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict:
    """The dataset or the mixture, from the hub, from folders or from local files.

    Raises:
        ValueError: neither is named, or a file does not exist.
    """
    if mixture.datasets:
        if script.dataset_name:
            logger.warning("`dataset_name` is ignored: the mixture in `datasets` is used.")
        for each in mixture.datasets:
            if loader := local_format(each.path):
                each.path, each.data_files = loader, each.path
        return get_dataset(mixture)
    if script.dataset_name is None:
        raise ValueError("`dataset_name` is missing: name a dataset or a local file, or a mixture in `datasets`.")
    name, streaming = script.dataset_name, script.dataset_streaming
    if loader := local_format(name):
        dataset = load_dataset(loader, data_files=name, streaming=streaming)
    else:
        dataset = load_dataset(name, name=script.dataset_config, streaming=streaming)
    if mixture.test_split_size is not None and script.dataset_test_split not in dataset:
        parts = dataset[script.dataset_train_split].train_test_split(test_size=mixture.test_split_size, seed=0)
        dataset = DatasetDict({script.dataset_train_split: parts["train"], script.dataset_test_split: parts["test"]})
    return dataset


def local_format(name: str) -> str | None:
    """The loader for a local file; None for a folder or a dataset on the hub.

    Raises:
        ValueError: it can only be a file, and there is none.
    """
    path = Path(name)
    loader = FORMATS.get(path.suffix.lower())
    if path.is_file() and loader is None:
        raise ValueError(f"`{name}` has an unknown format: a dataset file ends in {', '.join(FORMATS)}.")
    if loader and not path.is_file():
        raise ValueError(f"`{name}` does not exist: check the path of the dataset file.")
    return loader


def split_of(dataset: DatasetDict, name: str, argument: str) -> Dataset:
    """One split of a dataset.

    Raises:
        ValueError: there is no such split.
    """
    if name in dataset:
        return dataset[name]
    remedy = "" if argument == "dataset_train_split" else ", or set `test_split_size`, or `eval_strategy: no`"
    raise ValueError(f"`{argument}={name!r}` is no split of the dataset: choose one of {', '.join(dataset)}{remedy}.")


# --- reference model ---


def load_reference(reference: ReferenceArguments, training: SFTConfig) -> PreTrainedModel | None:
    """The reference model with its own options; precision, placement and attention are the policy's if not given."""
    if reference.ref_model_name_or_path is None:
        return None
    options = reference_options(training.model_init_kwargs, trust_remote_code=reference.ref_trust_remote_code)
    options["revision"] = reference.ref_model_revision
    if training.world_size > 1:
        options["device_map"] = None  # each process places it itself
    if reference.ref_dtype:
        options["dtype"] = reference.ref_dtype
    if reference.ref_attn_implementation:
        options["attn_implementation"] = reference.ref_attn_implementation
    if reference.ref_load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_compute_dtype(options.get("dtype"))
        )
    elif reference.ref_load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return create_model_from_path(reference.ref_model_name_or_path, **options)


def _compute_dtype(dtype: str | None) -> str:
    return "bfloat16" if dtype in (None, "auto") else dtype


if __name__ == "__main__":
    main(sys.argv[1:])
