"""The models of the study, trained from nothing through `QTargetSFTTrainer`: bases, a weak and a strong teacher."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import SFTConfig

from trl_qtarget import QTargetSFTTrainer

from .demonstrations import mixed_style, plain
from .settings import Study
from .tasks import problems
from .text import as_dataset, tokenizer


def make_model(sizes: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    texts = tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(texts),
            pad_token_id=texts.pad_token_id,
            eos_token_id=texts.eos_token_id,
            bos_token_id=None,
            **sizes,
        )
    )


def pretraining_pairs(mixture: dict[str, float], count: int, seed: int, mixed: bool) -> list[tuple[str, str]]:
    """Right solutions of several tasks, shuffled; in mixed styles, or all in the plain one."""
    rng = random.Random(seed)
    pairs = [
        (problem.prompt, mixed_style(problem, rng) if mixed else plain(*problem.work({})))
        for task, share in mixture.items()
        for problem in problems(task, round(share * count), "train", seed)
    ]
    rng.shuffle(pairs)
    return pairs


def arguments(directory: Path, **options: Any) -> SFTConfig:
    """What all training here has in common: AdamW, a warmed-up cosine down to zero, no checkpoints in between."""
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(directory),
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_length=None,
        completion_only_loss=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=False,
        dataloader_pin_memory=cuda,
        gradient_checkpointing=False,
        **options,
    )


class CountSteps(TrainerCallback):
    """Counts steps where another process can see it."""

    def __init__(self, counter: Any):
        self.counter = counter

    def on_step_end(self, args, state, control, **kwargs):
        with self.counter.get_lock():
            self.counter.value += 1


def steps_of(study: Study, name: str) -> int:
    """Optimiser steps of the training of one of `model_names`."""
    return study.teachers.get(name, {}).get("steps", study.pretraining["steps"])


def train_model(study: Study, name: str, directory: Path, counter: Any = None) -> None:
    """Train one of `model_names` and save it to `directory / name`, whole or not at all.

    Args:
        counter: a shared integer (`multiprocessing.Value`) that goes up with every step.
    """
    if name.startswith("base"):
        recipe, seed = study.pretraining, int(name.removeprefix("base"))
    else:
        recipe, seed = study.pretraining | study.teachers[name], study.teachers[name]["seed"]
    steps, batch = recipe["steps"], recipe["batch_size"]
    model = make_model(study.model, seed)
    trainer = QTargetSFTTrainer(
        model,
        arguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=recipe["learning_rate"],
            warmup_steps=steps // 40,
            logging_steps=50,
            seed=seed,
        ),
        train_dataset=as_dataset(pretraining_pairs(recipe["mixture"], steps * batch, seed, recipe["mixed_styles"])),
        processing_class=tokenizer(),
        qtarget_config="sft",
        callbacks=[CountSteps(counter)] if counter is not None else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    partial = directory / f".{name}"
    model.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(trainer.state.log_history))
    shutil.rmtree(directory / name, ignore_errors=True)
    partial.rename(directory / name)


def model_names(study: Study) -> list[str]:
    """Every model that the study needs: base0 is tuned on, the others are tested on."""
    bases = ["base0", *(f"base{seed}" for seed in study.test["seeds"])]
    teachers = [name for name in study.teachers if any(setting.reference == name for setting in study.settings)]
    return bases + teachers


def load(directory: Path, name: str) -> LlamaForCausalLM:
    """A trained model of the study, in float32."""
    return LlamaForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
