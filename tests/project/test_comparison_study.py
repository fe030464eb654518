"""The comparison of methods: which run comes next, and what a run reads."""

from dataclasses import replace

import pytest

from method_comparison import models, settings
from method_comparison.runs import TUNE, execute, make_run
from method_comparison.search import Point
from method_comparison.study import Cell, cells, finalists, pending
from method_comparison.text import tokenizer


def test_a_method_may_take_over_the_tuning_of_another():
    study, store = settings.load(), {}
    setting = next(setting for setting in study.settings if setting.name == "wrong30+strong")
    original, variant = (Cell(setting, study.method(name)) for name in ("target_sft", "target_sft_k8_same"))
    study = replace(study, settings=(setting,), methods=(variant.method, original.method))
    best = Point(0, original.method.start)
    while variant.chosen(study, store) is None:
        run = next(run for run in pending(study, store) if run.phase == TUNE)
        near = run.key == original.run(study, best, TUNE, run.seed).key
        assert run.method == "target_sft"
        store[run.key] = {"solved": {"0": [near] * 2, "1": [0] * 2}, "others": {}}
    assert variant.chosen(study, store) == original.chosen(study, store) == best
    tests = variant.tests(study, store)
    assert {(run.method, run.top_k, run.target) for run in tests} == {
        ("target_sft_k8_same", 8, original.tests(study, store)[0].target)
    }


def test_finalists_meet_a_seed_that_the_tuning_did_not(monkeypatch):
    study = settings.load()
    mine = [cell for cell in cells(study) if cell.setting.name == "wrong30+strong"]
    others = dict.fromkeys([cell.method.name for cell in mine if cell.method.only] + ["sft_again"], 1e3)
    scores = {cell.method.name: number for number, cell in enumerate(mine)} | others
    going_on = set()

    def known(cell, study, store):
        name, point = cell.method.name, Point(0, cell.method.start)
        return {point: scores[name]}, point if name in going_on else None

    monkeypatch.setattr(Cell, "scores", known)
    chosen = finalists(mine, study, {})
    names = sorted(set(scores) - set(others), key=scores.get)
    assert [cell.method.name for cell in chosen] == [*names[: -study.chooser["finalists"] - 1 : -1], "sft"]
    assert {cell.final(study, {}).seed for cell in chosen} == {study.chooser["seed"]} != {study.tuning["seed"]}
    going_on.add("dft")
    assert finalists(mine, study, {}) == []


def test_a_reference_is_read_from_a_cache(tmp_path):
    """Also where the trained model is measured; with every character in it, as from the model itself."""
    study = settings.load()
    sizes = study.model | {"num_hidden_layers": 1, "hidden_size": 32}
    study = replace(
        study,
        finetuning=study.finetuning | {"demonstrations": 32, "epochs": 2, "warmup_steps": 1},
        tuning=study.tuning | {"prompts": 4, "samples": 2},
        test=study.test | {"max_new_tokens": 4},
    )
    for seed, name in enumerate(("base0", "strong")):
        models.make_model(sizes, seed).save_pretrained(tmp_path / name)
    setting = next(setting for setting in study.settings if setting.name == "wrong30+strong")
    method = study.method("target_sft_k8")
    cached = replace(method, top_k=len(tokenizer()))
    live = replace(method, name="target_sft", top_k=0)
    seen = [execute(make_run(setting, each, 1, 1e-2, TUNE, 0), study, tmp_path) for each in (live, cached, method)]
    assert setting.reference == "strong" and seen[0]["nll"] == pytest.approx(seen[1]["nll"], abs=1e-4)
    assert seen[0]["nll"] != seen[2]["nll"]
