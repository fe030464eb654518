"""Data and a recipe to try `trl-qtarget tune` on: the demo's model and sums, a share of them worked with a wrong step.

python examples/tune_data.py --output_dir outputs/tune
trl-qtarget tune --config outputs/tune/recipe.yaml
"""

import argparse
import json
import random
from pathlib import Path

import yaml
from demo_model import packaged_model
from demo_task import Problem, task_problems, text_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tune"), help="Where all of it goes.")
    parser.add_argument("--model", help="Model to train: hub id or path. None: the packaged SmolLM2-135M-Instruct.")
    parser.add_argument("--rows", type=int, default=256, help="Sums to train on.")
    parser.add_argument("--problems", type=int, default=256, help="Sums to search and confirm on, half each.")
    parser.add_argument("--wrong", type=float, default=0.3, help="Share of the sums that have a wrong step.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sums and of the errors.")
    return parser.parse_args()


def with_wrong_step(worked: str, rng: random.Random) -> str:
    """A worked sum with one wrong result, from which the rest goes on rightly."""
    steps = [step.split(" = ")[0].split() for step in worked.splitlines()]
    wrong, total, lines = rng.randrange(len(steps)), int(steps[0][0]), []
    for number, (_, operator, term) in enumerate(steps):
        result = total + int(term) if operator == "+" else total - int(term)
        result += rng.choice((-3, -2, -1, 1, 2, 3)) if number == wrong else 0
        lines.append(f"{total} {operator} {term} = {result}")
        total = result
    return "\n".join(lines)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def demonstration(problem: Problem, share: float, rng: random.Random) -> dict:
    """A row of the training data, right or not."""
    solution = with_wrong_step(problem.reference, rng) if rng.random() < share else problem.reference
    return {"prompt": problem.prompt, "completion": [{"role": "assistant", "content": solution}]}


def main() -> None:
    arguments = parse_arguments()
    folder, rng = arguments.output_dir, random.Random(arguments.seed)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = task_problems("chain_sum", {}, arguments.rows, arguments.problems, arguments.seed)
    write_lines(folder / "rows.jsonl", [demonstration(problem, arguments.wrong, rng) for problem in train])
    answers = [{"prompt": each.prompt, "answer": text_of(each.completion).split()[-1]} for each in held_out]
    write_lines(folder / "problems.jsonl", answers)
    recipe = {
        "model_name_or_path": arguments.model or str(packaged_model(folder.parent)),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "study"),
        "dtype": "float32",
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "max_steps": 32,
        "warmup_steps": 5,
        "logging_steps": 8,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        # The study's own.
        "problems": str(folder / "problems.jsonl"),
        "methods": ["sft", "dft", "target_sft"],
        "metric": "greedy_accuracy",
        "max_new_tokens": 48,
        "trials": 3,
        "budget": "1h",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    print(f"trl-qtarget tune --config {folder / 'recipe.yaml'}")


if __name__ == "__main__":
    main()
