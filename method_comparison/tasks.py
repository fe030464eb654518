"""Problems with worked solutions: multi-step arithmetic of our own, and tasks of `reasoning-gym` with its own scorers.

The models of this study read single characters, so prompts are terse: a letter for the task, the problem, and `?`. A
solution is a list of steps and, after `#`, the answer. Which split a prompt belongs to is decided by a hash of its
text, so that no prompt is ever in two splits, whatever the seed.
"""

import functools
import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import reasoning_gym


# Shares of all prompts, in tenths: pretraining and demonstrations, tuning, test.
SPLITS = {"train": range(2, 10), "tune": range(1, 2), "test": range(0, 1)}


@dataclass(frozen=True)
class Step:
    """One operation: `left` is written before the equals sign, `right` after it."""

    left: str
    right: str


@dataclass(frozen=True)
class Problem:
    """A prompt and how to work it out.

    `work(slips)` gives the steps and the answer; `slips` maps the number of a step to a function that makes a wrong
    result of the right one, and what follows is worked out from the wrong one.
    """

    task: str
    prompt: str
    work: Callable[[dict[int, Callable[[int], int]]], tuple[list[Step], str]]
    is_correct: Callable[[str], bool]

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.work({})[1]

    def solved_by(self, completion: str) -> bool:
        """Whether a completion ends in the right answer. Only the answer is judged, not the steps."""
        _, mark, answer = completion.partition("#")
        return bool(mark) and self.is_correct(answer)


# Problems without end, from a seed.
Stream = Callable[[int], Iterator[Problem]]


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to."""
    tenth = zlib.crc32(prompt.encode()) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def problems(
    task: str, count: int, split: str, seed: int, distinct: bool = False, tasks: dict[str, Stream] | None = None
) -> list[Problem]:
    """`count` problems of a task from one split; the same for the same arguments.

    Args:
        tasks: where the task is found by its name; None: those of the small models.

    Raises:
        ValueError: the task or the split is unknown, or has too few distinct problems.
    """
    tasks = TASKS if tasks is None else tasks
    if task not in tasks:
        raise ValueError(f"`task={task!r}` is unknown: choose one of {', '.join(tasks)}.")
    if split not in SPLITS:
        raise ValueError(f"`split={split!r}` is unknown: choose one of {', '.join(SPLITS)}.")
    found: dict[Any, Problem] = {}
    stream = tasks[task](zlib.crc32(f"{task} {split} {seed}".encode()))
    for problem in itertools.islice(stream, 100_000 + 100 * count):
        if split_of(problem.prompt) == split:
            found.setdefault(problem.prompt if distinct else len(found), problem)
            if len(found) == count:
                return list(found.values())
    raise ValueError(f"`count={count}` is more than the {len(found)} problems of `{task}` in the split `{split}`.")


# --- arithmetic, one operation per step ---


def _apply(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def chain_work(
    start: int, operations: tuple[tuple[str, int], ...], slips: dict[int, Callable[[int], int]]
) -> tuple[list[Step], str]:
    value, steps = start, []
    for number, (operator, operand) in enumerate(operations):
        result = _apply(value, operator, operand)
        if number in slips:
            result = slips[number](result)
        steps.append(Step(f"{value}{operator}{operand}", str(result)))
        value = result
    return steps, str(value)


def _operations(rng: random.Random, operators: str) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Three or four operations whose results all stay within 0 and 99."""
    while True:
        start = value = rng.randint(2, 30)
        operations = []
        for _ in range(rng.randint(3, 4)):
            operator = rng.choice(operators)
            operand = rng.randint(2, 5) if operator == "*" else rng.randint(2, 40)
            value = _apply(value, operator, operand)
            operations.append((operator, operand))
            if not 0 <= value <= 99:
                break
        else:
            return start, tuple(operations)


def _arithmetic(task: str, write: Callable, operators: str, seed: int) -> Iterator[Problem]:
    rng = random.Random(seed)
    while True:
        start, operations = _operations(rng, operators)
        work = functools.partial(chain_work, start, operations)
        answer = work({})[1]
        yield Problem(task, write(start, operations), work, functools.partial(str.__eq__, answer))


def _infix(letter: str, start: int, operations: tuple[tuple[str, int], ...]) -> str:
    """From left to right: `a7+8*2?` is 30."""
    return f"{letter}{start}" + "".join(f"{operator}{operand}" for operator, operand in operations) + "?"


def _postfix(letter: str, start: int, operations: tuple[tuple[str, int], ...]) -> str:
    """`p7,8+2*?` is 30."""
    return f"{letter}{start}" + "".join(f",{operand}{operator}" for operator, operand in operations) + "?"


# --- reasoning-gym ---


def entries(name: str, seed: int, **sizes: Any) -> Iterator[tuple[dict[str, Any], Callable[[str], bool]]]:
    """Entries without end. One of reasoning-gym depends on its seed plus its index, so seeds must lie far apart."""
    dataset = reasoning_gym.create_dataset(name, seed=(seed % 2**20) * 2**11, size=2**31 - 1, **sizes)
    index = 0
    while True:
        entry = dataset[index]
        yield entry, functools.partial(_scored, dataset, entry)
        index += 1


def _scored(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    return dataset.score_answer(answer, entry) == 1.0


def _chain_sum(seed: int) -> Iterator[Problem]:
    for entry, score in entries("chain_sum", seed, min_terms=4, max_terms=5, min_digits=1, max_digits=2):
        first, *rest = entry["metadata"]["expression"].split()
        operations = tuple((sign, int(term)) for sign, term in zip(rest[::2], rest[1::2], strict=True))
        prompt = _infix("s", int(first), operations)
        yield Problem("chain_sum", prompt, functools.partial(chain_work, int(first), operations), score)


def _gcd_work(first: int, second: int, slips: dict[int, Callable[[int], int]]) -> tuple[list[Step], str]:
    steps: list[Step] = []
    while second:
        remainder = first % second
        if len(steps) in slips:
            remainder = abs(slips[len(steps)](remainder)) % second
        steps.append(Step(f"{first}%{second}", str(remainder)))
        first, second = second, remainder
    return steps, str(first)


def _gcd(seed: int) -> Iterator[Problem]:
    for entry, score in entries("gcd", seed, max_value=199):
        numbers = entry["metadata"]["numbers"]
        if entry["metadata"]["result"] < 3:
            continue  # 1 and 2 are the answer three times in four: a guess would look like skill
        first, second = max(numbers), min(numbers)
        yield Problem("gcd", f"g{first},{second}?", functools.partial(_gcd_work, first, second), score)


def _without_steps(answer: str, slips: dict[int, Callable[[int], int]]) -> tuple[list[Step], str]:
    return [], answer


def _number_sorting(seed: int) -> Iterator[Problem]:
    sizes = {"max_numbers": 4, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0}
    for entry, score in entries("number_sorting", seed, **sizes):
        metadata = entry["metadata"]
        sign = "<" if metadata["direction"] == "ascending" else ">"
        prompt = f"o{sign}{','.join(integers(metadata['original_numbers']))}?"
        answer = ",".join(integers(metadata["sorted_numbers"]))
        yield Problem(
            "number_sorting",
            prompt,
            functools.partial(_without_steps, answer),
            functools.partial(sorted_scored, score),
        )


def integers(numbers: list[str]) -> list[str]:
    return [str(int(float(number))) for number in numbers]


def sorted_scored(score: Callable[[str], bool], answer: str) -> bool:
    """reasoning-gym reads a list of strings."""
    return score(str([f"{number}.0" if "." not in number else number for number in answer.split(",")]))


def _spell_backward(seed: int) -> Iterator[Problem]:
    for entry, _ in entries("spell_backward", seed, max_word_len=7):
        word = entry["metadata"]["word"].lower()
        if word.isascii() and word.isalpha():
            work = functools.partial(_without_steps, word[::-1])
            yield Problem("spell_backward", f"w{word}?", work, functools.partial(str.__eq__, word[::-1]))


TASKS: dict[str, Stream] = {
    "chain": functools.partial(_arithmetic, "chain", functools.partial(_infix, "a"), "+-*"),
    "chain_easy": functools.partial(_arithmetic, "chain_easy", functools.partial(_infix, "a"), "+-"),
    "postfix": functools.partial(_arithmetic, "postfix", functools.partial(_postfix, "p"), "+-*"),
    "chain_sum": _chain_sum,
    "gcd": _gcd,
    "number_sorting": _number_sorting,
    "spell_backward": _spell_backward,
}
