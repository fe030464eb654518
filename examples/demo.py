"""Fine-tune a language model toward an explicit target distribution, and show what it learned.

Without arguments: SmolLM2-135M-Instruct learns to work through sums, with LoRA and the method `target_sft`, whose
prior is the model before training (its base weights, adapters off). That takes minutes on two CPU cores; a GPU is used
if there is one.
`--model`, `--dataset` and `--method` take any other. `python examples/demo.py --help` explains every argument.
"""

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path


# Before it is imported with the others: it would list the kernels that a CPU lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import datasets
import torch
from demo_model import packaged_model
from demo_task import Problem, as_dataset, dataset_problems, task_problems, text_of
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)
from trl import SFTConfig

from trl_qtarget import METHODS, QTargetConfig, QTargetSFTTrainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="Model to train: hub id or path. None: the packaged SmolLM2-135M-Instruct.")
    parser.add_argument(
        "--dataset",
        help="Data to train on: a .json, .jsonl or .parquet file, or a hub id, with the columns `prompt` and "
        "`completion`, or `messages`. None: problems of --task.",
    )
    parser.add_argument("--task", default="chain_sum", help="Task of reasoning-gym, if there is no --dataset.")
    parser.add_argument(
        "--task_args", type=json.loads, default={}, help="Difficulty of the task, as JSON: '{\"max_terms\": 5}'."
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--method", choices=list(METHODS), default="target_sft", help="Published objective.")
    target.add_argument("--config", help="A qtarget_config.json (or its folder) with a target of your own.")
    parser.add_argument("--ref_model", help="Reference model or teacher, as prior: hub id or path.")
    parser.add_argument("--max_steps", type=int, default=64, help="Optimiser steps.")
    parser.add_argument("--batch_size", type=int, default=8, help="Examples per step.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak of the cosine schedule.")
    parser.add_argument("--lora_rank", type=int, default=16, help="Rank of the adapters; alpha is twice as large.")
    parser.add_argument(
        "--lora_modules",
        default="q_proj,k_proj,v_proj,o_proj",
        help="Linear layers that get an adapter, by the end of their name; or all-linear.",
    )
    parser.add_argument("--eval_problems", type=int, default=64, help="Held-out problems, solved before and after.")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Longest answer to a held-out problem.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="Where models and adapters go.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of problems, adapters and order.")
    arguments = parser.parse_args()
    for name in ("max_steps", "batch_size", "lora_rank", "eval_problems", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return arguments


class TargetProgress(ProgressCallback):
    """The trainer's progress bar with the target's metrics on it, instead of a line of numbers per report."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "target/nll" in logs:
            shown = {name: f"{float(logs[f'target/{name}']):.3f}" for name in ("nll", "trust", "label_mass")}
            self.training_bar.set_postfix(shown)


@dataclass(frozen=True)
class Evaluation:
    """What the model does on the held-out problems; `nll` is a mean per completion token, in nats."""

    nll: float
    accuracy: float
    answers: list[str]


def load_problems(arguments: argparse.Namespace) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and held-out ones."""
    if arguments.dataset:
        return dataset_problems(arguments.dataset, arguments.eval_problems, arguments.seed)
    size = arguments.max_steps * arguments.batch_size
    return task_problems(arguments.task, arguments.task_args, size, arguments.eval_problems, arguments.seed)


def make_trainer(
    arguments: argparse.Namespace,
    target: QTargetConfig,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Problem],
    held_out: list[Problem],
    adapter_dir: Path,
) -> QTargetSFTTrainer:
    modules = arguments.lora_modules
    cuda = torch.cuda.is_available()
    trainer = QTargetSFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        SFTConfig(
            output_dir=str(adapter_dir),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, arguments.max_steps // 10),
            logging_steps=2,
            seed=arguments.seed,
            bf16=cuda and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=False,  # the demo's sequences are short; memory is not what it lacks
            dataloader_pin_memory=cuda,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=as_dataset(train),
        eval_dataset=as_dataset(held_out),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=2 * arguments.lora_rank,
            target_modules=modules if modules == "all-linear" else modules.split(","),
        ),
        qtarget_config=target,
        ref_model=arguments.ref_model,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TargetProgress)
    return trainer


def evaluate(
    trainer: QTargetSFTTrainer, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], max_new_tokens: int
) -> Evaluation:
    """NLL of the reference completions, and the model's own answers, decoded greedily."""
    nll = trainer.evaluate()["eval_target/nll"]
    answers = generate(trainer.model, tokenizer, [problem.prompt for problem in problems], max_new_tokens)
    solved = [problem.solved_by(answer) for problem, answer in zip(problems, answers, strict=True)]
    return Evaluation(nll, sum(solved) / len(solved), answers)


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    model.eval()
    answers = []
    with tqdm(total=len(prompts), desc="Answering held-out problems") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            # Padded on the left, so that every answer begins right after its prompt.
            inputs = tokenizer(
                [prompt_text(tokenizer, prompt) for prompt in batch],
                padding=True,
                padding_side="left",
                add_special_tokens=isinstance(batch[0], str),  # a chat template writes its own
                return_tensors="pt",
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            answers += tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
            bar.update(len(batch))
    return [answer.strip() for answer in answers]


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str | list) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def report(problems: list[Problem], before: Evaluation, after: Evaluation) -> None:
    """A table of the numbers, and the first two problems with the answers to them."""
    print(f"\n{len(problems)} held-out problems          before     after")
    print(f"{'NLL, nats per token':<30}{before.nll:>10.3f}{after.nll:>10.3f}")
    print(f"{'exact match of the answer':<30}{before.accuracy:>10.1%}{after.accuracy:>10.1%}")
    for problem, old, new in list(zip(problems, before.answers, after.answers, strict=True))[:2]:
        print(f"\n{text_of(problem.prompt)}")
        for when, answer in (("before", old), ("after", new)):
            verdict = "right" if problem.solved_by(answer) else "wrong"
            print(f"  {when} ({verdict}):")
            print("\n".join(f"    {line}" for line in answer.splitlines()))


def quiet() -> None:
    """Leave the screen to the progress bars and to what the trainer says about its target."""
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)


def main() -> None:
    arguments = parse_arguments()
    quiet()
    set_seed(arguments.seed)
    target = QTargetConfig.from_pretrained(arguments.config) if arguments.config else QTargetConfig(arguments.method)
    output_dir = arguments.output_dir.resolve()
    model_path = arguments.model or str(packaged_model(output_dir))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train, held_out = load_problems(arguments)
    if tokenizer.chat_template is None and not isinstance(train[0].prompt, str):
        raise SystemExit(
            f"--model {model_path} has no chat template: name an instruction-tuned model, or a --dataset whose "
            "`prompt` and `completion` are plain text."
        )
    adapter_dir = output_dir / f"adapter-{target.method or 'custom'}"
    trainer = make_trainer(arguments, target, model_path, tokenizer, train, held_out, adapter_dir)

    print(f"{model_path}: {target.label} on {arguments.dataset or arguments.task}, {len(train)} examples", flush=True)
    before = evaluate(trainer, tokenizer, held_out, arguments.max_new_tokens)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = evaluate(trainer, tokenizer, held_out, arguments.max_new_tokens)
    trainer.save_model()

    report(held_out, before, after)
    print(f"\nTrained for {seconds:.0f} s. The adapter is in {adapter_dir}")
    print(f'Load it with: peft.AutoPeftModelForCausalLM.from_pretrained("{adapter_dir}")')


if __name__ == "__main__":
    main()
