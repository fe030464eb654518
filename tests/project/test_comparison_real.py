"""The comparison on a real model: its tasks, its runs on a tiny model, its page."""

import re

import pytest
import torch

from method_comparison import analysis
from method_comparison.analysis import GREEDY
from method_comparison.demonstrations import demonstrations
from method_comparison.real import models, page, runs, settings
from method_comparison.real.__main__ import COMMITTED, words
from method_comparison.real.analysis import AGAIN, Found, Pair, against_sft
from method_comparison.real.tasks import TASKS, family, is_solved, make_problems, writer
from method_comparison.runs import TUNE, base_run
from method_comparison.store import Store
from method_comparison.study import pending, total_runs


@pytest.mark.parametrize("task", TASKS)
def test_solutions_are_right_and_wrong_steps_lead_to_wrong_answers(task):
    asked = make_problems(task, 40, "train", 1)
    clean, _ = demonstrations(asked, "clean", 0.0, 0, writer(task))
    assert all(is_solved(problem, text) for problem, (_, text) in zip(asked, clean, strict=True))
    flawed, chosen = demonstrations(asked, "wrong_step", 0.3, 0, writer(task))
    right = [is_solved(problem, text) for problem, (_, text) in zip(asked, flawed, strict=True)]
    assert sum(chosen) == 12 and right == [not wrong for wrong in chosen]
    for (_, mine), (_, wrong), is_wrong in zip(clean, flawed, chosen, strict=True):
        assert (mine != wrong) == is_wrong and len(mine.splitlines()) == len(wrong.splitlines())
        if is_wrong:  # a step is wrong, and what follows is worked out from it
            lines = list(zip(mine.splitlines(), wrong.splitlines(), strict=True))
            first = next(number for number, (a, b) in enumerate(lines) if a != b)
            asked, made = (re.split("[=:]", line)[0] for line in lines[first])
            assert asked == made, "the first that differs is a result"
            if family(task) == "sums":
                assert all(eval(line.replace("=", "==")) for _, line in lines[first + 1 :])


def test_a_notation_of_our_own_says_nothing():
    for task in ("sums_unseen", "sorting_unseen"):
        for problem in make_problems(task, 40, "train", 1):
            assert re.fullmatch(r"Work out [@#\d, ]+\.", problem.prompt), problem.prompt


def test_only_the_answer_is_judged():
    (total,) = make_problems("sums", 1, "test", 0)
    (order,) = make_problems("sorting", 1, "test", 0)
    assert is_solved(total, f"Let me see. It is 1 + 1 = 2, so the answer is {total.answer}.")
    assert is_solved(order, f"Here they are:\n[{order.answer}]\nI hope this helps!")
    assert not is_solved(total, f"{total.answer} and 1000") and not is_solved(total, "") and not is_solved(order, "no")
    assert not is_solved(order, ", ".join(reversed(order.answer.split(", "))))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick study, and its results, left and gone on with in the middle."""
    study, folder = settings.load(quick=True), tmp_path_factory.mktemp("real")
    models.prepare(study, folder)
    store = Store(folder, study)
    while (run := next(pending(study, store), None)) is not None:
        store.add(runs.execute(run, study, folder))
        if len(store.results) == 5:
            store = Store(folder, study)
    return study, store


def test_quick_study_measures_what_the_page_tells(quick, tmp_path):
    study, store = quick
    assert len(store.results) == total_runs(study) == 2 + 3 * (3 + 2)
    for result in store.results.values():
        for temperature, counts in result["solved"].items():
            most = 1 if temperature == "0" else study.test["samples"]
            assert len(counts) == study.test["prompts"] and all(0 <= count <= most for count in counts)
        assert list(result["others"]) == ["sorting"]
        assert (result["kl"] == 0) == (result["method"] == "base"), "an adapter that is not trained changes nothing"
        assert ("alpha" in result) == (result["method"] == "adaptive_sft")
    rates = {result["learning_rate"] for result in store.results.values() if result["phase"] == TUNE}
    assert sorted(rates) == pytest.approx([2.5e-4, 1e-3, 4e-3])
    written = page.write(study, store, tmp_path).read_text()
    assert "All 17 runs are done." in written and (tmp_path / page.FIGURE).stat().st_size > 10_000
    (setting,) = study.settings
    tested = analysis.Tested(study, store)
    for row in tested.rows(setting):
        assert f"{row.mean('nll'):.3f}" in written
    assert set(against_sft(setting, tested, GREEDY)) == {"adaptive_sft", AGAIN}


def test_kl_is_that_of_the_whole_vocabulary(quick, tmp_path):
    study, store = quick
    folder = store.directory / study.model["name"]
    trainer = runs._trainer(base_run(study.settings[0], TUNE, 0), study, folder, tmp_path)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    solutions = runs._solutions(make_problems("sorting", 3, "tune", 0), "clean", 0.0, 0, folder)
    total, count, model = 0.0, 0, trainer.model.eval()
    for row in solutions:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            mine = model(ids).logits[0].double().softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0].double().softmax(-1)
        for at, is_answer in enumerate(row["completion_mask"]):
            if is_answer:
                total += float((base[at - 1] * (base[at - 1] / mine[at - 1]).log()).sum())
                count += 1
    assert runs._kl_to_base(trainer, solutions) == pytest.approx(total / count, rel=1e-4) != 0


@pytest.mark.parametrize(
    ("small", "real", "word"),
    [
        (1, 1, "agree"),
        (-1, -1, "agree"),
        (0, 0, "neither"),
        (1, 0, "small only"),
        (0, -1, "real only"),
        (1, -1, "contradict"),
    ],
)
def test_words_of_agreement(small, real, word):
    assert Pair("dft", "sums-clean", Found(small, 0.1, small), Found(real, 0.1, real)).word == word


def test_study_asks_what_it_promises():
    study = settings.load(seeds=5)
    assert study.test["seeds"] == [1, 2, 3, 4, 5] and study.fingerprint == settings.load().fingerprint
    names = {"sft", "sft_again", "dft", "asft", "target_sft", "profit", "iw_sft", "adaptive_sft"}
    assert {method.name for method in study.methods} == names
    assert dict(study.method("adaptive_sft").target(0, "base")) == {"method": "adaptive_sft", "prior": "base"}
    with pytest.raises(ValueError, match="`seeds=1` must be at least 2"):
        settings.load(seeds=1)


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="no results of the real model have been committed yet")
def test_committed_page_says_what_the_committed_results_say(tmp_path):
    study = settings.load()
    made = page.write(study, Store(COMMITTED, study, writable=False), tmp_path, words())
    assert made.read_text(encoding="utf-8") == (settings.HERE / "README.md").read_text(encoding="utf-8")
    assert (settings.HERE / page.FIGURE).is_file()
