# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-qtarget[peft,quantization]"]
# ///
"""QLoRA on one card: fine-tune a model of 7 or 8 billion parameters in 24 GB, toward an explicit target.

    python examples/qlora.py --model meta-llama/Llama-3.1-8B-Instruct --dataset chats.jsonl

NF4 weights with double quantisation, paged 8-bit AdamW, gradient checkpointing, packing, and as the prior the base
weights under the adapters, which cost no memory of their own. `docs/memory.md` accounts for every gigabyte, and
`python examples/memory.py --model ...` computes the account of another model. `--resume` goes on from the last
checkpoint. Without a CUDA GPU the same script trains small models, in float32 and with PyTorch's AdamW.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path


# Before it is imported with the others: it would list the kernels that a CPU lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import SFTConfig

from trl_qtarget import METHODS, QTargetConfig, QTargetSFTTrainer


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="Model to train: hub id or path.")
    add("--dataset", required=True, help="A .json, .jsonl or .parquet file, or a hub id, in any format of TRL.")
    add("--method", choices=list(METHODS), default="target_sft", help="Published objective.")
    add("--config", help="A qtarget_config.json (or its folder) with a target of your own, instead of --method.")
    add("--ref_model", help="Teacher of the same tokenizer: hub id or path. Loaded in NF4, as the policy is.")
    add("--max_length", type=int, default=4096, help="Tokens of a packed row.")
    add("--batch_size", type=int, default=2, help="Rows in memory at a time.")
    add("--accumulation", type=int, default=8, help="Batches per optimiser step.")
    add("--chunk_tokens", type=int, help="Tokens that the loss scores at a time. None: 64 Mi logits.")
    add("--learning_rate", type=float, default=2e-4, help="Peak of the cosine schedule.")
    add(
        "--lora_rank", type=int, default=16, help="Rank of the adapters of all linear layers; alpha is twice as large."
    )
    add("--epochs", type=float, default=1.0, help="Passes over the dataset.")
    add("--max_steps", type=int, default=-1, help="Optimiser steps, if above 0, instead of --epochs.")
    add("--save_steps", type=int, default=100, help="Optimiser steps from one checkpoint to the next.")
    add("--resume", action="store_true", help="Go on from the last checkpoint in --output_dir.")
    add("--dtype", choices=["bfloat16", "float32"], help="Of what is computed. None: bfloat16 on CUDA, else float32.")
    add("--attn_implementation", default="sdpa", help="flash_attention_2, if it is installed, builds no mask.")
    add("--output_dir", type=Path, default=Path("outputs/qlora"), help="Where checkpoints and the adapter go.")
    add("--seed", type=int, default=0, help="Seed of adapters and order.")
    return parser.parse_args(argv)


def load_rows(source: str) -> Dataset:
    """The rows of a local file, or of the `train` split of a dataset on the hub."""
    file_format = FILE_FORMATS.get(Path(source).suffix)
    if file_format is None:
        return load_dataset(source, split="train")
    if not Path(source).is_file():
        raise SystemExit(f"--dataset {source}: there is no such file.")
    return load_dataset(file_format, data_files=source, split="train")


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 whose scales are quantised once more: 4.13 bits per weight instead of 4.5."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_teacher(path: str | None, dtype: torch.dtype) -> PreTrainedModel | None:
    if path is None:
        return None
    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=quantization(dtype), device_map=device
    )


def make_trainer(arguments: argparse.Namespace) -> QTargetSFTTrainer:
    cuda = torch.cuda.is_available()
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    if not cuda:
        print("No CUDA GPU: PyTorch's AdamW, because paged 8-bit AdamW needs CUDA.", flush=True)
    target = QTargetConfig.from_pretrained(arguments.config) if arguments.config else QTargetConfig(arguments.method)
    if arguments.chunk_tokens is not None:
        target = replace(target, chunk_tokens=arguments.chunk_tokens)
    return QTargetSFTTrainer(
        arguments.model,
        SFTConfig(
            output_dir=str(arguments.output_dir),
            # What is not quantised (embeddings, head, norms) has this dtype; left out, it would be float32.
            model_init_kwargs={"dtype": dtype, "attn_implementation": arguments.attn_implementation},
            use_cpu=not cuda,
            bf16=dtype == torch.bfloat16,
            optim="paged_adamw_8bit" if cuda else "adamw_torch",
            gradient_checkpointing=True,
            packing=True,
            max_length=arguments.max_length,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.accumulation,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            save_steps=arguments.save_steps,
            save_total_limit=2,
            logging_steps=1,
            dataloader_pin_memory=cuda,
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=load_rows(arguments.dataset),
        quantization_config=quantization(dtype),
        peft_config=LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=2 * arguments.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        qtarget_config=target,
        ref_model=load_teacher(arguments.ref_model, dtype),
    )


def main(argv: list[str] | None = None) -> QTargetSFTTrainer:
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)
    trainer = make_trainer(arguments)
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    if torch.cuda.is_available():
        print(f"Most memory that PyTorch held: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    print(f"The adapter is in {arguments.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
