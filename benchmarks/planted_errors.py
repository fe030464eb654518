"""Do suspicious labels find wrong demonstrations? Planted errors, ranked by several methods and by plain NLL.

python -m benchmarks.planted_errors

Sums with worked steps (the demo's task and model), some with one wrong step carried on, some with another number for
the final answer. The model sees them as they are; the ranking of whole examples is compared with what was planted.
"""

import argparse
import csv
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.files import replacing
from trl_qtarget.inspection.collect import inspect_rows
from trl_qtarget.inspection.suspicious import WORST, suspicious_examples, suspicious_tokens

from .common import RESULTS, machine_facts


sys.path.append(str(Path(__file__).parents[1] / "examples"))

from demo_model import packaged_model
from demo_task import Problem, task_problems


METHODS = ("dft", "profit", "eaft", "asft", "target_sft")


# --- planted errors ---


def wrong_answer(steps: list[str], rng: random.Random) -> tuple[list[str], int]:
    """Another number after the last equals sign."""
    before, number = steps[-1].rsplit(" ", 1)
    return [*steps[:-1], f"{before} {_other(int(number), rng)}"], len(steps) - 1


def wrong_step(steps: list[str], rng: random.Random) -> tuple[list[str], int]:
    """A wrong result of a step before the last, from which all that follows is worked out."""
    place = rng.randrange(len(steps) - 1)
    found = list(steps[:place])
    value = int(steps[place].split()[0]) if place else None
    for number, step in enumerate(steps[place:], start=place):
        left, operator, right = step.split(" = ")[0].split()
        start = int(left) if value is None or number == place else value
        result = start + int(right) if operator == "+" else start - int(right)
        value = _other(result, rng) if number == place else result
        found.append(f"{start} {operator} {right} = {value}")
    return found, place


def _other(number: int, rng: random.Random) -> int:
    return number + rng.choice((-10, -2, -1, 1, 2, 10))


KINDS: dict[str, Callable[[list[str], random.Random], tuple[list[str], int]]] = {
    "wrong_answer": wrong_answer,
    "wrong_step": wrong_step,
}


def plant(problems: list[Problem], kind: str, share: float, seed: int) -> tuple[Dataset, set[int]]:
    """The problems as a dataset, an exact share of them with an error, and the numbers of these."""
    rng = random.Random(seed)
    planted = set(rng.sample(range(len(problems)), round(share * len(problems))))
    rows = []
    for number, problem in enumerate(problems):
        steps = problem.completion[0]["content"].split("\n")
        if number in planted:
            steps, _ = KINDS[kind](steps, rng)
        rows.append({"prompt": problem.prompt, "completion": [{"role": "assistant", "content": "\n".join(steps)}]})
    return Dataset.from_list(rows), planted


# --- rankings ---


def rankings(data: dict[str, Any]) -> dict[str, list[int]]:
    """Numbers of the examples, the most suspicious first, by NLL and by each method."""
    found: dict[str, dict[int, float]] = {"mean NLL": {}, "largest NLL": {}, f"{WORST} largest NLL": {}}
    for example in data["examples"]:
        number, worst = int(example["name"]), sorted(example["nll"], reverse=True)
        for name, count in zip(found, (len(worst), 1, WORST), strict=True):
            found[name][number] = sum(worst[:count]) / len(worst[:count])
    order = {name: sorted(scores, key=lambda number: -scores[number]) for name, scores in found.items()}
    for number, method in enumerate(data["methods"]):
        rows = suspicious_examples(data, number)
        order[f"suspicion by {method['name']}"] = [int(row["example"]) for row in rows]
    return order


def judge(order: list[int], planted: set[int]) -> dict[str, float]:
    """Precision among as many as were planted (recall is the same), recall in twice as many, average precision."""
    count = len(planted)
    hits, precisions = 0, []
    for rank, number in enumerate(order, start=1):
        if number in planted:
            hits += 1
            precisions.append(hits / rank)
    return {
        "precision": len(planted & set(order[:count])) / count,
        "recall_twice": len(planted & set(order[: 2 * count])) / count,
        "average_precision": sum(precisions) / count,
    }


def table(rows: list[dict[str, str]]) -> str:
    """Precision of every ranking in Markdown, a column for each kind of error and stage."""
    columns = list(dict.fromkeys((row["kind"], row["stage"]) for row in rows))
    found = {(row["ranking"], row["kind"], row["stage"]): float(row["precision"]) for row in rows}
    heads = [f"{kind.replace('_', ' ')}, {stage.split()[0]}" for kind, stage in columns]
    lines = [f"| ranking by | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    for ranking in dict.fromkeys(row["ranking"] for row in rows):
        cells = " | ".join(f"{found[ranking, *column]:.2f}" for column in columns)
        lines.append(f"| {ranking} | {cells} |")
    return "\n".join(lines)


# --- the models ---


def make_trainer(model_path: str, dataset: Dataset, steps: int, seed: int) -> QTargetSFTTrainer:
    cuda = torch.cuda.is_available()
    return QTargetSFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        SFTConfig(
            output_dir="outputs/planted_errors",
            max_steps=max(1, steps),
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            gradient_checkpointing=False,
            use_cpu=not cuda,
            bf16=False,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        qtarget_config="target_sft",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=192, help="demonstrations")
    parser.add_argument("--share", type=float, default=0.2, help="share of them with an error")
    parser.add_argument("--steps", type=int, default=48, help="steps of training on them before they are ranked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "planted_errors.csv")
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    model_path = str(packaged_model(Path("outputs").resolve()))
    problems, _ = task_problems("chain_sum", {}, arguments.examples, 8, arguments.seed)
    facts = machine_facts("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for kind in KINDS:
        dataset, planted = plant(problems, kind, arguments.share, arguments.seed)
        trainer = make_trainer(model_path, dataset, arguments.steps, arguments.seed)
        for stage in ("before training", f"after {arguments.steps} steps on the same data"):
            if stage != "before training":
                trainer.train()
            configs = [trainer.qtarget_config.coerce(name) for name in METHODS]
            data = inspect_rows(trainer, trainer.train_dataset, configs, {}, progress=True)
            worst = {row["example"] for row in suspicious_tokens(data)[: len(planted)]}
            print(f"{kind}, {stage}: {len(worst & set(map(str, planted)))} planted examples hold a worst token")
            for name, order in rankings(data).items():
                found = judge(order, planted)
                rows.append({"kind": kind, "stage": stage, "ranking": name, **found, **vars(arguments), **facts})
                print(f"  {name:28}" + "  ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    for row in rows:
        row.pop("output")
    with replacing(arguments.output) as whole, whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
