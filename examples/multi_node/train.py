"""Train a language model toward an explicit target distribution, on any number of machines.

The same script runs on one CPU and under every launcher of this folder. Arguments are those of TRL's own scripts
(`SFTConfig`, `ModelConfig`), of `QTargetConfig`, and the few below; `--config file.yaml` reads them from a file.
Started again with the same `--output_dir`, it goes on from the last checkpoint, or leaves a finished run as it is.
While it runs, a second one in the same folder is refused.
"""

import logging
from dataclasses import dataclass, field

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from trl_qtarget import QTargetConfig, QTargetSFTTrainer, last_whole_checkpoint, one_run_in


@dataclass
class Arguments(ScriptArguments):
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference model or teacher, as prior: hub id or path."}
    )


def load_split(arguments: Arguments, split: str) -> Dataset | IterableDataset:
    """A split of a hub dataset; a .json or .jsonl file is all training data."""
    name, streaming = arguments.dataset_name, arguments.dataset_streaming
    if name.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files={arguments.dataset_train_split: name}, split=split, streaming=streaming)
    return load_dataset(name, arguments.dataset_config, split=split, streaming=streaming)


def checkpoint_of(training: SFTConfig) -> str | None:
    """The checkpoint to go on from: the last whole one, or the one that is named; none with `false`."""
    named = str(training.resume_from_checkpoint)
    if named.lower() in ("none", "true"):
        return last_whole_checkpoint(training.output_dir)
    return None if named.lower() == "false" else named


def main() -> None:
    parser = TrlParser((Arguments, SFTConfig, QTargetConfig, ModelConfig))
    # Under DeepSpeed, `SFTConfig` has to exist before any model: only then are weights sharded while they are loaded.
    arguments, training, target, model = parser.parse_args_and_config()
    for name, given in (("dataset_name", arguments.dataset_name), ("model_name_or_path", model.model_name_or_path)):
        if not given:
            raise SystemExit(f"--{name} is missing")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)  # which prior was chosen
    with one_run_in(training.output_dir):
        train(arguments, training, target, model)


def train(arguments: Arguments, training: SFTConfig, target: QTargetConfig, model: ModelConfig) -> None:
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (training.model_init_kwargs or {})

    evaluated = training.eval_strategy != "no"
    trainer = QTargetSFTTrainer(
        model.model_name_or_path,
        training,
        train_dataset=load_split(arguments, arguments.dataset_train_split),
        eval_dataset=load_split(arguments, arguments.dataset_test_split) if evaluated else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        qtarget_config=target,
        ref_model=arguments.ref_model,
    )

    # Rank 0 decides for all: nodes that see different folders would otherwise start at different steps.
    checkpoint = broadcast_object_list([checkpoint_of(training)])[0]
    if trainer.is_world_process_zero():
        print(f"Resuming from {checkpoint}" if checkpoint else "Starting from the beginning", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # rank 0 is still writing; who left before would look like a failure
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
