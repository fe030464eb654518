"""The demo's problems: what it says when a task is too small to hold any out."""

from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_task_with_nothing_to_hold_out(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(EXAMPLES)
    from demo_task import task_problems

    # All sums of two digits with a sign between them: a few hundred.
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = task_problems("chain_sum", small, 8, 4, 0)
    assert len(train) == 8 and len(held_out) == 4
    with pytest.raises(
        SystemExit, match="so few problems that 3000 to train on leave none to hold out: make it larger"
    ):
        task_problems("chain_sum", small, 3000, 4, 0)
