"""Kinds of demonstrations: how a worked solution is written down, and what is wrong with it."""

import random
from collections.abc import Callable

from .tasks import Problem, Step


def plain(steps: list[Step], answer: str) -> str:
    """`7+8=15,15*2=30#30`: every clean demonstration, and most of pretraining."""
    return ",".join(f"{step.left}={step.right}" for step in steps) + f"#{answer}"


def arrows(steps: list[Step], answer: str) -> str:
    """`7+8>15;15*2>30#30`."""
    return ";".join(f"{step.left}>{step.right}" for step in steps) + f"#{answer}"


def terse(steps: list[Step], answer: str) -> str:
    """`15,30#30`: results only."""
    return ",".join(step.right for step in steps) + f"#{answer}"


def direct(steps: list[Step], answer: str) -> str:
    """`#30`: no work at all."""
    return f"#{answer}"


Write = Callable[[list[Step], str], str]
WORDINGS: tuple[Write, ...] = (plain, arrows, terse)
# How a solution is written in the pretraining mixture: (wording, share).
PRETRAINING_STYLES = ((plain, 0.55), (arrows, 0.15), (terse, 0.15), (direct, 0.15))


def mixed_style(problem: Problem, rng: random.Random) -> str:
    """A right solution in one of the styles of pretraining."""
    wordings, shares = zip(*PRETRAINING_STYLES, strict=True)
    return rng.choices(wordings, shares)[0](*problem.work({}))


def slip(result: int, rng: random.Random) -> int:
    """A wrong result near the right one, as slips of the pen are."""
    return abs(result + rng.choice((-10, -2, -1, 1, 2, 10)))


def _clean(problem: Problem, rng: random.Random, write: Write) -> str:
    return write(*problem.work({}))


def _wrong_step(problem: Problem, rng: random.Random, write: Write) -> str:
    """One step has a wrong result, carried on to a wrong answer."""
    steps, answer = problem.work({})
    while True:
        number = rng.randrange(len(steps))
        wrong = problem.work({number: lambda result: slip(result, rng)})
        if wrong[1] != answer:
            return write(*wrong)


def _wrong_answer(problem: Problem, rng: random.Random, write: Write) -> str:
    """All steps are right, the answer after `#` is not."""
    steps, answer = problem.work({})
    wrong = answer
    while wrong == answer:
        wrong = str(slip(int(answer), rng))
    return write(steps, wrong)


def _wordings(problem: Problem, rng: random.Random, write: Write) -> str:
    """One of several equally right ways to write the steps."""
    return rng.choice(WORDINGS)(*problem.work({}))


def _skipped(problem: Problem, rng: random.Random, write: Write) -> str:
    """One step is left out, though not the first and not the last."""
    steps, answer = problem.work({})
    kept = rng.randrange(1, len(steps) - 1) if len(steps) > 2 else len(steps)
    return write([step for number, step in enumerate(steps) if number != kept], answer)


KINDS: dict[str, Callable[[Problem, random.Random, Write], str]] = {
    "clean": _clean,
    "wrong_step": _wrong_step,
    "wrong_answer": _wrong_answer,
    "wordings": _wordings,
    "skipped": _skipped,
}


def demonstrations(
    problems: list[Problem], kind: str, share: float, seed: int, write: Write = plain
) -> tuple[list[tuple[str, str]], list[bool]]:
    """Prompts with completions, of which exactly a `share` (rounded) is of a `kind` and the rest clean.

    Args:
        write: how a solution is written down (`wordings` has ways of its own).

    Returns:
        The pairs, and for each whether it is one of that share.

    Raises:
        ValueError: the kind is unknown, or the share is no share.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind={kind!r}` is unknown: choose one of {', '.join(KINDS)}.")
    if not 0 <= share <= 1:
        raise ValueError(f"`share={share!r}` must lie between 0 and 1.")
    rng = random.Random(seed)
    chosen = set(rng.sample(range(len(problems)), round(share * len(problems))))
    pairs = [
        (problem.prompt, KINDS[kind if number in chosen else "clean"](problem, rng, write))
        for number, problem in enumerate(problems)
    ]
    return pairs, [number in chosen for number in range(len(problems))]
