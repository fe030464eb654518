"""Train toward a target with transformers' own `Trainer`: TRL is not needed.

The data is a .json or .jsonl file of `prompt` and `completion`; only completions are learned.

python examples/plain_trainer.py --model outputs/SmolLM2-135M-Instruct --dataset pairs.jsonl --method asft --use_cpu
"""

import argparse
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from trl_qtarget import QTargetMixin


class QTargetTrainer(QTargetMixin, Trainer):
    """The mixin comes first: it takes the place of the trainer's loss."""


def tokenised(pair: dict[str, str], tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, list[int]]:
    """A pair as the collator takes it: labels are the token ids, and -100 where nothing is learned."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    completion = tokenizer(pair["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {
        "input_ids": (prompt + completion)[:longest],
        "labels": ([-100] * len(prompt) + completion)[:longest],
    }


def make_trainer(arguments: argparse.Namespace, **options: Any) -> QTargetTrainer:
    """A trainer of what the command line names; `options` go to the training arguments."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=arguments.dataset, split="train")
    return QTargetTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"),
        TrainingArguments(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps,
            learning_rate=arguments.learning_rate,
            per_device_train_batch_size=arguments.batch_size,
            use_cpu=arguments.use_cpu,
            bf16=not arguments.use_cpu,
            logging_steps=1,
            report_to="none",
            **options,
        ),
        train_dataset=data.map(tokenised, fn_kwargs={"tokenizer": tokenizer, "longest": arguments.max_length}),
        # Pads labels with -100, and returns an attention mask.
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        qtarget_config=arguments.method,
        ref_model=arguments.ref_model,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Model to train: hub id or path.")
    parser.add_argument("--dataset", required=True, help="A .json or .jsonl file of `prompt` and `completion`.")
    parser.add_argument("--method", default="target_sft", help="The objective: `trl-qtarget methods` lists them.")
    parser.add_argument("--ref_model", help="Reference model or teacher: hub id or path.")
    parser.add_argument("--output_dir", default="outputs/plain-trainer", help="Where the model goes.")
    parser.add_argument("--max_steps", type=int, default=100, help="Optimiser steps.")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--batch_size", type=int, default=8, help="Pairs per step and device.")
    parser.add_argument("--max_length", type=int, default=1024, help="Longest pair, in tokens; the rest is cut off.")
    parser.add_argument("--use_cpu", action="store_true", help="Train on the CPU, in float32.")
    trainer = make_trainer(parser.parse_args())
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
