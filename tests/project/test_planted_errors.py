"""The benchmark of noise finding: what it plants, and how it judges a ranking."""

import random
import sys
from pathlib import Path

import pytest


pytest.importorskip("reasoning_gym")
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import itertools

from demo_task import task_problems

from benchmarks.common import RESULTS, read_results
from benchmarks.planted_errors import KINDS, judge, plant, table


PROBLEMS, _ = task_problems("chain_sum", {}, 60, 8, 0)


def _right(step: str) -> bool:
    left, result = step.split(" = ")
    first, operator, second = left.split()
    value = int(first) + int(second) if operator == "+" else int(first) - int(second)
    return value == int(result)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_share_is_planted_and_the_rest_is_untouched(kind):
    dataset, planted = plant(PROBLEMS, kind, 0.25, seed=1)
    assert len(planted) == 15
    for number, (problem, row) in enumerate(zip(PROBLEMS, dataset, strict=True)):
        steps = row["completion"][0]["content"].split("\n")
        before = problem.completion[0]["content"].split("\n")
        assert row["prompt"] == problem.prompt and len(steps) == len(before)
        assert sum(not _right(step) for step in steps) == (number in planted)
        assert (steps == before) == (number not in planted)


def test_wrong_step_is_carried_on():
    rng = random.Random(0)
    for problem in PROBLEMS:
        steps, place = KINDS["wrong_step"](problem.completion[0]["content"].split("\n"), rng)
        assert place < len(steps) - 1 and not _right(steps[place])
        for earlier, later in itertools.pairwise(steps):
            assert later.startswith(earlier.split(" = ")[1] + " ")


def test_judging_a_ranking():
    assert judge([3, 2, 0, 1], {2, 3}) == {"precision": 1.0, "recall_twice": 1.0, "average_precision": 1.0}
    assert judge([0, 1, 2, 3], {2, 3})["average_precision"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert judge([0, 1, 2, 3, 4], {4}) == {"precision": 0.0, "recall_twice": 0.0, "average_precision": 0.2}


def test_documentation_holds_the_measured_table():
    page = Path(__file__).parents[2] / "docs" / "howto" / "inspect.md"
    assert table(read_results(RESULTS / "planted_errors.csv")) in page.read_text(encoding="utf-8")
