"""The demo's problems: from a `reasoning-gym` task, whose answers its own scorer verifies, or from any dataset."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


STEPS = {"role": "system", "content": "Work step by step, one operation per line."}
# Sizes that a model of 135M parameters can learn in minutes. Every other task has the sizes of reasoning-gym.
TASK_ARGS = {"chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}}
# A reasoning-gym problem depends only on its seed plus its index, so training and held-out seeds must lie far apart.
HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True)
class Problem:
    """A prompt with its reference completion (both text, or both messages), and a judge of the final answer."""

    prompt: Any
    completion: Any
    is_correct: Callable[[str], bool]

    @property
    def reference(self) -> str:
        """The reference completion as text."""
        return text_of(self.completion)

    def solved_by(self, generated: str) -> bool:
        """Whether the generated text ends in the right answer."""
        return self.is_correct(final_answer(generated, self.reference))


def text_of(turns: Any) -> str:
    """The text of the last message, or the text itself."""
    return turns if isinstance(turns, str) else turns[-1]["content"]


def final_answer(generated: str, reference: str) -> str:
    """The last number if the reference ends in a number, else the last line.

    So prose around an answer ("The answer is 10.") is not held against a model.
    """
    if re.search(r"\d$", reference.strip()):
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", generated)
        return numbers[-1].replace(",", "") if numbers else ""
    lines = generated.strip().splitlines()
    return lines[-1].strip() if lines else ""


def as_dataset(problems: list[Problem]) -> Dataset:
    """The problems as the trainer reads them."""
    return Dataset.from_list([{"prompt": problem.prompt, "completion": problem.completion} for problem in problems])


# --- reasoning-gym ---


def task_problems(
    task: str, task_args: dict[str, Any], train_size: int, held_out_size: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on, and held-out problems of other seeds; no question is in both."""
    options = TASK_ARGS.get(task, {}) | task_args
    train = _generate(task, options, train_size, seed)
    seen = {text_of(problem.prompt) for problem in train}
    # Small problems repeat, so more are made than needed.
    fresh = _generate(task, options, 4 * held_out_size, HELD_OUT_SEED + seed)
    held_out = {text_of(problem.prompt): problem for problem in fresh if text_of(problem.prompt) not in seen}
    if not held_out:
        raise SystemExit(
            f"The task {task!r} with {options} has so few problems that {train_size} to train on leave none to hold "
            "out: make it larger with --task_args, or lower --max_steps or --batch_size."
        )
    return train, list(held_out.values())[:held_out_size]


def _generate(task: str, options: dict[str, Any], size: int, seed: int) -> list[Problem]:
    import reasoning_gym  # which a dataset of one's own does not need

    try:
        generated = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise SystemExit(f"reasoning-gym cannot make the task {task!r} with {options}: {error}") from None
    return [_problem(task, generated, entry) for entry in generated]


def _problem(task: str, generated: Any, entry: dict[str, Any]) -> Problem:
    prompt, metadata = [{"role": "user", "content": entry["question"].strip()}], entry["metadata"]
    if task == "chain_sum":
        prompt, solution = [STEPS, *prompt], worked_chain_sum(metadata["expression"])
    else:
        solution = metadata.get("answer_cot") or str(entry["answer"])
    return Problem(
        prompt=prompt,
        completion=[{"role": "assistant", "content": solution}],
        is_correct=lambda answer: generated.score_answer(answer, entry) == 1.0,
    )


def worked_chain_sum(expression: str) -> str:
    """One line per operation: `4 - 1 - 7` becomes `4 - 1 = 3` and `3 - 7 = -4`."""
    first, *rest = expression.split()
    total, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        steps.append(f"{total} {operator} {term} = {result}")
        total = result
    return "\n".join(steps)


# --- any dataset ---


def dataset_problems(source: str, held_out_size: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems of a file or of a dataset on the hub, shuffled and split; each row's own answer is the reference."""
    rows = _load(source).shuffle(seed=seed)
    if len(rows) <= held_out_size:
        raise SystemExit(
            f"--dataset {source} has {len(rows)} rows, too few to hold out {held_out_size}: lower --eval_problems."
        )
    problems = [_row_problem(source, row) for row in rows]
    return problems[held_out_size:], problems[:held_out_size]


def _load(source: str) -> Dataset:
    path, formats = Path(source), {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if path.suffix not in formats:
        if path.is_file():
            raise SystemExit(f"--dataset {source}: a file must end in {', '.join(formats)}.")
        return load_dataset(source, split="train")
    if not path.is_file():
        raise SystemExit(f"--dataset {source}: there is no such file.")
    return load_dataset(formats[path.suffix], data_files=str(path), split="train")


def _row_problem(source: str, row: dict[str, Any]) -> Problem:
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif "messages" in row and len(row["messages"]) > 1 and row["messages"][-1]["role"] == "assistant":
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    else:
        raise SystemExit(
            f"--dataset {source} must have the columns `prompt` and `completion`, or `messages` that end with the "
            f"assistant's; it has: {', '.join(row)}."
        )
    reference = text_of(completion)
    answer = final_answer(reference, reference)
    return Problem(prompt, completion, is_correct=lambda given: given == answer)
