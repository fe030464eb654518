"""One run on the real model: train an adapter toward a target, then measure what it learned and what it forgot."""

import logging
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.tuning.answers import shares_right

from ..demonstrations import demonstrations
from ..evaluation import GREEDY, mean
from ..models import arguments
from ..runs import TUNE, Run
from ..settings import Study
from ..tasks import Problem
from . import models
from .tasks import OTHER, family, is_solved, make_problems, messages, writer


# Answers at a time, and solutions at a time that are only read.
GENERATED, READ = 256, 32


def execute(run: Run, study: Study, directory: Path) -> dict[str, Any]:
    """Train and measure. A model that diverged solves nothing.

    Returns:
        The run's fields and its results, named as those of the small models: `solved`, per temperature the number of
        right answers to each prompt; `others`, of the other task the share of right answers, greedy and at temperature
        1; `nll` (nats per token) and `entropy` on right solutions; `train_nll`, on the demonstrations in the last
        epoch. Besides: `kl`, of the trained model from the untrained one on right solutions of the other task, nats
        per token; `alpha`, the exponent that `adaptive_sft` has measured; `seconds` of it all, `train_seconds`.
    """
    started = time.perf_counter()
    logging.getLogger("trl_qtarget").setLevel(logging.ERROR)
    result: dict[str, Any] = {"key": run.key, **asdict(run), "target": dict(run.target)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = directory / study.model["name"]
        trainer = _trainer(run, study, folder, Path(scratch))
        if run.target:
            trained = trainer.train()
            result["train_seconds"] = round(trained.metrics["train_runtime"], 1)
            logged = [entry["target/nll"] for entry in trainer.state.log_history if "target/nll" in entry]
            result["train_nll"] = round(logged[-1], 4)
            if QTargetConfig(**dict(run.target)).open_knobs:
                result["alpha"] = round(trainer.resolved_target.config.alpha, 4)
        result |= _measure(trainer, run, study, folder)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def _trainer(run: Run, study: Study, folder: Path, scratch: Path) -> QTargetSFTTrainer:
    options, texts = study.finetuning, models.tokenizer(folder)
    # 1000 apart: what one seed decides (problems, noise, adapter, order) has nothing in common with what another does.
    seed = 1000 * (run.seed + 1) + (500 if run.phase == TUNE else 0) + 100 * run.replica
    asked = make_problems(run.task, options["demonstrations"], "train", seed)
    trainer = QTargetSFTTrainer(
        models.load(folder, study.model["dtype"]),
        arguments(
            scratch,
            num_train_epochs=options["epochs"],
            per_device_train_batch_size=options["batch_size"],
            per_device_eval_batch_size=READ,
            learning_rate=run.learning_rate or 1.0,
            warmup_steps=options["warmup_steps"],
            logging_steps=math.ceil(options["demonstrations"] / options["batch_size"]),
            seed=seed,
        ),
        train_dataset=_solutions(asked, run.kind, run.share, seed, folder),
        processing_class=texts,
        peft_config=models.adapter(study),
        qtarget_config=QTargetConfig(**(dict(run.target) or {"method": "sft"})),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _solutions(asked: list[Problem], kind: str, share: float, seed: int, folder: Path) -> Dataset:
    pairs, _ = demonstrations(asked, kind, share, seed, writer(asked[0].task))
    written = [(problem, text) for problem, (_, text) in zip(asked, pairs, strict=True)]
    return models.as_dataset(written, models.tokenizer(folder))


def _measure(trainer: QTargetSFTTrainer, run: Run, study: Study, folder: Path) -> dict[str, Any]:
    """Prompts are the same for all seeds of a phase, so that trainings can be compared prompt by prompt."""
    options = study.tuning if run.phase == TUNE else study.test
    longest = study.test["max_new_tokens"]
    asked = make_problems(run.task, options["prompts"], run.phase, 0, distinct=True)
    other = OTHER[family(run.task)]
    others = make_problems(other, options["other_prompts"], run.phase, 0, distinct=True)
    scores = trainer.evaluate(_solutions(asked, "clean", 0.0, 0, folder))
    results: dict[str, Any] = {
        "nll": round(scores["eval_target/nll"], 4),
        "entropy": round(scores["eval_entropy"], 4),
        "solved": {f"{temperature:g}": [0] * len(asked) for temperature in options["temperatures"]},
        "others": {other: [0.0, 0.0]},
        "kl": None,
    }
    if not math.isfinite(scores["eval_target/nll"]):
        return results
    for temperature in options["temperatures"]:
        counts = _solved_counts(trainer, asked, temperature, options["samples"], longest, run.seed)
        results["solved"][f"{temperature:g}"] = counts
    samples = options["other_samples"]
    greedy = mean(_solved_counts(trainer, others, GREEDY, 1, longest, run.seed))
    sampled = mean(_solved_counts(trainer, others, 1.0, samples, longest, run.seed)) / samples
    results["others"][other] = [round(greedy, 4), round(sampled, 4)]
    results["kl"] = float(f"{_kl_to_base(trainer, _solutions(others, 'clean', 0.0, 0, folder)):.4g}")
    return results


def _solved_counts(
    trainer: QTargetSFTTrainer, asked: list[Problem], temperature: float, samples: int, longest: int, seed: int
) -> list[int]:
    """How many of `samples` answers to each problem are right; one greedy answer at temperature 0."""
    by_number = {str(number): problem for number, problem in enumerate(asked)}
    shares = shares_right(
        trainer.model,
        trainer.processing_class,
        [messages(problem) for problem in asked],
        list(by_number),
        lambda number, text: is_solved(by_number[number], text),
        samples=samples,
        temperature=temperature,
        max_new_tokens=longest,
        batch_size=GENERATED,
        seed=seed,
    )
    return [round(share * (samples if temperature else 1)) for share in shares]


@torch.inference_mode()
def _kl_to_base(trainer: QTargetSFTTrainer, solutions: Dataset) -> float:
    """KL(base || model), the mean over the tokens of solutions, in nats."""
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model).eval()
    total, count = 0.0, 0
    for batch in trainer.get_eval_dataloader(trainer.prepare_rows(solutions, "solutions")):
        labelled = batch["labels"][:, 1:] != -100
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        mine = model(**inputs).logits[:, :-1][labelled].float().log_softmax(-1)
        with model.disable_adapter():
            base = model(**inputs).logits[:, :-1][labelled].float().log_softmax(-1)
        total += (base.exp() * (base - mine)).sum(-1).double().sum().item()
        count += int(labelled.sum())
    return total / count
