"""Two tasks of `reasoning-gym` with worked solutions, each in words and in a notation that no model has ever read.

A solution is a line per step; only the answer in the last line is judged. In the notation of our own `@` means plus,
or smallest first, and `#` minus, or largest first: nothing but the demonstrations says so. The steps are written in
the signs that everyone knows, as in the small comparison's `postfix`.
"""

import functools
import re
from collections.abc import Callable, Iterator

from ..demonstrations import Write
from ..tasks import Problem, Step, Stream, chain_work, entries, integers, problems, sorted_scored


SYSTEM = "Work step by step."


# --- sums ---


def _in_words(expression: str) -> str:
    return f"Work out {expression}."


def _in_signs(expression: str) -> str:
    return f"Work out {expression.replace('+', '@').replace('-', '#')}."


def _sums(name: str, ask: Callable[[str], str], seed: int) -> Iterator[Problem]:
    """Three or four digits; no result on the way is negative, for its sign could be read as a minus."""
    for entry, score in entries("chain_sum", seed, min_terms=3, max_terms=4, min_digits=1, max_digits=1):
        expression = entry["metadata"]["expression"]
        first, *rest = expression.split()
        operations = tuple((sign, int(term)) for sign, term in zip(rest[::2], rest[1::2], strict=True))
        work = functools.partial(chain_work, int(first), operations)
        if all(int(step.right) >= 0 for step in work({})[0]):
            yield Problem(name, ask(expression), work, score)


def write_sum(steps: list[Step], answer: str) -> str:
    """`7 + 8 = 15` and `15 - 2 = 13`, a line each; the last result is the answer."""
    return "\n".join(f"{step.left.replace('+', ' + ').replace('-', ' - ')} = {step.right}" for step in steps)


def _last_number(text: str) -> str:
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


# --- sorting ---


def _order_in_words(numbers: str, ascending: bool) -> str:
    return f"Sort {numbers} in {'ascending' if ascending else 'descending'} order."


def _order_in_signs(numbers: str, ascending: bool) -> str:
    return f"Work out {'@' if ascending else '#'} {numbers}."


def _sort_work(
    numbers: tuple[int, ...], ascending: bool, slips: dict[int, Callable[[int], int]]
) -> tuple[list[Step], str]:
    """The next number is picked of those that are left; a slip picks another, and the rest goes on without that."""
    left, picked, steps = list(numbers), [], []
    while len(left) > 1:
        ordered = sorted(left, reverse=not ascending)
        right = ordered[0]
        if len(steps) in slips:
            others = [number for number in ordered if number != right] or [right]
            right = others[slips[len(steps)](0) % len(others)]
        steps.append(Step(", ".join(map(str, left)), str(right)))
        left.remove(right)
        picked.append(right)
    return steps, ", ".join(map(str, [*picked, *left]))


def _sorting(name: str, ask: Callable[[str, bool], str], seed: int) -> Iterator[Problem]:
    """Four numbers below 100, all different."""
    sizes = {"min_numbers": 4, "max_numbers": 4, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0}
    for entry, score in entries("number_sorting", seed, **sizes):
        metadata = entry["metadata"]
        numbers, ascending = integers(metadata["original_numbers"]), metadata["direction"] == "ascending"
        work = functools.partial(_sort_work, tuple(map(int, numbers)), ascending)
        if len(set(numbers)) == len(numbers):
            yield Problem(name, ask(", ".join(numbers), ascending), work, functools.partial(sorted_scored, score))


def write_order(steps: list[Step], answer: str) -> str:
    """`9, 4, 7: 4` and `9, 7: 7`, a line each, then the answer `4, 7, 9`."""
    return "\n".join([*(f"{step.left}: {step.right}" for step in steps), answer])


def _last_numbers(text: str) -> str:
    """The numbers of the last line that has any."""
    lines = [numbers for line in text.splitlines() if (numbers := re.findall(r"\d+", line))]
    return ",".join(lines[-1]) if lines else ""


# --- both ---

TASKS: dict[str, Stream] = {
    "sums": functools.partial(_sums, "sums", _in_words),
    "sums_unseen": functools.partial(_sums, "sums_unseen", _in_signs),
    "sorting": functools.partial(_sorting, "sorting", _order_in_words),
    "sorting_unseen": functools.partial(_sorting, "sorting_unseen", _order_in_signs),
}
# How a solution is written, and where in a text its answer is.
_WRITERS: dict[str, Write] = {"sums": write_sum, "sorting": write_order}
_ANSWERS: dict[str, Callable[[str], str]] = {"sums": _last_number, "sorting": _last_numbers}
# What a model that is trained on one may forget.
OTHER = {"sums": "sorting", "sorting": "sums"}

make_problems = functools.partial(problems, tasks=TASKS)


def family(task: str) -> str:
    """The task in words."""
    return task.removesuffix("_unseen")


def writer(task: str) -> Write:
    """How solutions of a task are written."""
    return _WRITERS[family(task)]


def is_solved(problem: Problem, text: str) -> bool:
    """Whether a generated text ends in the right answer, by reasoning-gym's own score."""
    answer = _ANSWERS[family(problem.task)](text)
    return bool(answer) and problem.is_correct(answer)


def messages(problem: Problem) -> list[dict[str, str]]:
    """A problem as a chat model is asked."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem.prompt}]
