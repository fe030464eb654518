"""The data of the comparison of methods: its problems, and demonstrations that are right or wrong as asked."""

import re

import pytest

from method_comparison.demonstrations import WORDINGS, demonstrations
from method_comparison.tasks import SPLITS, TASKS, Problem, problems
from method_comparison.text import as_dataset, tokenizer


STEPPED = ("chain", "chain_easy", "postfix", "chain_sum", "gcd")


def _value(left: str) -> int:
    first, operator, second = re.fullmatch(r"(-?\d+)([-+*%])(\d+)", left).groups()
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "%": int.__mod__}
    return apply[operator](int(first), int(second))


def _equations(completion: str) -> tuple[list[tuple[str, int]], str]:
    steps, _, answer = completion.partition("#")
    pairs = [step.split("=") for step in steps.split(",")] if steps else []
    return [(left, int(right)) for left, right in pairs], answer


# --- problems ---


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_judged_by_their_answer(task):
    for problem in problems(task, 50, "test", 0):
        assert problem.solved_by(f"#{problem.answer}")
        assert problem.solved_by(f"1+1=3#{problem.answer}"), "only the answer counts"
        assert not problem.solved_by(problem.answer), "an answer follows its mark"
        assert not problem.solved_by(f"#{problem.answer}7")
        assert not problem.solved_by("#") and not problem.solved_by("")


@pytest.mark.parametrize("task", STEPPED)
def test_steps_are_right_and_lead_to_the_answer(task):
    for problem in problems(task, 100, "train", 3):
        steps, answer = problem.work({})
        assert all(_value(step.left) == int(step.right) for step in steps)
        assert answer == (steps[-1].left.partition("%")[2] if task == "gcd" else steps[-1].right)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_is_in_two_splits_and_seeds_differ(task):
    prompts = {split: {problem.prompt for problem in problems(task, 150, split, 0)} for split in SPLITS}
    assert not prompts["train"] & prompts["tune"] and not prompts["train"] & prompts["test"]
    assert not prompts["tune"] & prompts["test"]
    again = [problem.prompt for problem in problems(task, 20, "test", 0)]
    assert again == [problem.prompt for problem in problems(task, 20, "test", 0)]
    assert again != [problem.prompt for problem in problems(task, 20, "test", 1)]


@pytest.mark.slow
def test_unknown_and_exhausted_tasks_are_refused():
    with pytest.raises(ValueError, match="`task='sums'` is unknown"):
        problems("sums", 1, "test", 0)
    with pytest.raises(ValueError, match="`split='all'` is unknown"):
        problems("chain", 1, "all", 0)
    with pytest.raises(ValueError, match="`count=2000` is more than"):
        problems("gcd", 2000, "test", 0, distinct=True)


# --- demonstrations ---


def _demonstrated(kind: str, share: float = 1.0, task: str = "chain") -> list[tuple[Problem, str, bool]]:
    asked = problems(task, 100, "train", 5)
    pairs, chosen = demonstrations(asked, kind, share, seed=1)
    assert [prompt for prompt, _ in pairs] == [problem.prompt for problem in asked]
    return [(problem, pair[1], mark) for problem, pair, mark in zip(asked, pairs, chosen, strict=True)]


@pytest.mark.parametrize("kind", ["wrong_step", "wrong_answer"])
def test_share_of_wrong_demonstrations_is_exact(kind):
    found = _demonstrated(kind, share=0.3)
    assert sum(mark for _, _, mark in found) == 30
    assert all(problem.solved_by(completion) != mark for problem, completion, mark in found)


@pytest.mark.parametrize("task", STEPPED)
def test_wrong_step_is_one_and_is_carried_on(task):
    for problem, completion, _ in _demonstrated("wrong_step", task=task):
        steps, answer = _equations(completion)
        assert sum(_value(left) != right for left, right in steps) == 1
        assert not problem.solved_by(completion)
        if task == "gcd":
            assert answer == steps[-1][0].partition("%")[2]
        else:
            assert int(answer) == steps[-1][1]
            assert all(left.startswith(f"{before}") for (left, _), (_, before) in zip(steps[1:], steps, strict=False))


def test_wrong_answer_follows_right_steps():
    for problem, completion, _ in _demonstrated("wrong_answer"):
        steps, _ = _equations(completion)
        assert all(_value(left) == right for left, right in steps)
        assert str(steps[-1][1]) == problem.answer and not problem.solved_by(completion)


def test_skipped_step_is_neither_the_first_nor_the_last():
    for problem, completion, _ in _demonstrated("skipped"):
        full = [(step.left, int(step.right)) for step in problem.work({})[0]]
        steps, _ = _equations(completion)
        assert len(steps) == len(full) - 1 and steps[0] == full[0] and steps[-1] == full[-1]
        assert problem.solved_by(completion)


def test_wordings_are_all_used_and_all_right():
    found = _demonstrated("wordings")
    written = [{wording(*problem.work({})) for wording in WORDINGS} for problem, _, _ in found]
    assert all(completion in texts for (_, completion, _), texts in zip(found, written, strict=True))
    for wording in WORDINGS:
        assert any(completion == wording(*problem.work({})) for problem, completion, _ in found)


def test_demonstrations_refuse_nonsense():
    with pytest.raises(ValueError, match="`kind='sloppy'` is unknown"):
        demonstrations([], "sloppy", 0.1, 0)
    with pytest.raises(ValueError, match=r"`share=1\.5` must lie between 0 and 1"):
        demonstrations([], "clean", 1.5, 0)


def test_dataset_marks_the_completion():
    row = as_dataset([("a1+2?", "#3")])[0]
    assert tokenizer().decode(row["input_ids"]) == "a1+2?#3<eos>"
    assert row["completion_mask"] == [0] * 5 + [1] * 3
