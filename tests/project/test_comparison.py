"""The comparison of methods: its search, its runs, and the numbers on its page."""

import json
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import end, finish, start

from method_comparison import analysis, everywhere, page, settings, tables
from method_comparison.__main__ import COMMITTED
from method_comparison.analysis import AT_BEST, AT_ONE, GREEDY, Row, difference
from method_comparison.runs import TEST, TUNE, Run, base_run, check, make_run, score
from method_comparison.search import Point, Search
from method_comparison.store import Store
from method_comparison.study import cells, pending


METHODS = (
    *("sft", "label_smoothing", "dft", "beyond_log", "profit", "eaft", "iw_sft"),
    *("psft", "gem", "sft_kl", "asft", "distill", "distill_hybrid", "target_sft"),
    *("infosft", "saft", "deft", "idft", "rank_tuner", "trim_sft", "tofu", "gift", "prift", "mask_target"),
)


# --- search ---


searches = st.builds(
    lambda knobs, start, budget, extra: Search(knobs, min(start, knobs - 1), budget, extra),
    *(st.integers(1, 7), st.integers(0, 6), st.integers(4, 15), st.integers(0, 4)),
)


def _searched(search: Search, value) -> dict[Point, float]:
    scores: dict[Point, float] = {}
    while (point := search.next(scores)) is not None:
        assert point not in scores and 0 <= point.knob < search.knobs
        scores[point] = value(point)
    return scores


@given(searches, st.integers(0, 1000))
def test_search_keeps_to_its_budget_and_resumes(search, seed):
    """Whatever the scores are, and from every point at which it may have been interrupted."""
    scores = _searched(search, lambda point: random.Random(f"{seed} {point}").random())
    assert search.budget <= len(scores) <= search.budget + search.extra
    points = list(scores)
    for known in range(len(points)):
        assert search.next({point: scores[point] for point in points[:known]}) == points[known]


@pytest.mark.parametrize("knobs", [1, 5])
@pytest.mark.parametrize("rate", [-9, -4, 0, 3, 8])
def test_search_finds_a_peak_within_what_it_tried(knobs, rate):
    search = Search(knobs, knobs // 2, budget=12, extra=3)
    peak = Point(rate, min(3, knobs - 1))
    scores = _searched(search, lambda point: -abs(point.rate - peak.rate) - 2 * abs(point.knob - peak.knob))
    best = search.best(scores)
    assert abs(best.rate - peak.rate) <= 1 and best.knob == peak.knob
    assert not search.edges(scores)


def test_search_tells_of_an_edge():
    search = Search(5, 2, budget=6, extra=1)
    scores = _searched(search, lambda point: point.rate)
    assert len(scores) == 7 and search.edges(scores)


# --- settings ---


def test_study_asks_what_it_promises():
    study = settings.load()
    check(study)
    names = {method.name for method in study.methods}
    assert set(METHODS) < names, "free combinations come on top"
    assert len(study.settings) >= 10
    assert {setting.reference for setting in study.settings} == {"none", "base", "weak", "strong"}
    assert {0.1, 0.3} <= {setting.share for setting in study.settings if setting.kind == "wrong_step"}
    assert any(setting.others_weight for setting in study.settings)
    assert len(study.test["seeds"]) >= 3
    assert 0 not in study.test["seeds"], "base0 is tuned on"


def test_every_target_of_the_study_differs_from_run_to_run():
    study = settings.load()
    keys = set()
    for cell in cells(study):
        for knob in range(len(cell.method.ladder)):
            keys.add(make_run(cell.setting, cell.method, knob, 1e-3, TUNE, 0).key)
    data = {(s.task, s.kind, s.share) for s in study.settings}
    own = sum(len(m.ladder) for m in study.methods if m.needs == "nothing") * len(data)
    assert len(keys) > own


def test_a_run_without_a_prior_serves_settings_that_differ_in_the_reference():
    study = settings.load()
    by_name = {setting.name: setting for setting in study.settings}
    keys = {make_run(by_name[name], study.method("dft"), 0, 1e-3, TEST, 1).key for name in ("clean", "clean+strong")}
    assert len(keys) == 1
    keys = {make_run(by_name[name], study.method("asft"), 0, 1e-3, TEST, 1).key for name in ("clean", "clean+strong")}
    assert len(keys) == 2


def test_settings_refuse_nonsense(tmp_path):
    with pytest.raises(ValueError, match="`task='sums'` of the setting `new` is unknown"):
        settings._setting("new", {"task": "sums", "kind": "clean", "share": 0, "reference": "base", "title": ""})
    with pytest.raises(ValueError, match="`default` of `asft`"):
        settings._method("asft", {"knob": "lam", "ladder": [0.1], "default": 0.05, "needs": "reference"})
    with pytest.raises(ValueError, match="`tau` is not used"):
        settings._method("asft", {"knob": "tau", "ladder": [0.1], "default": 0.1})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ("needs: reference, tuned_as: target_sft", "must be a method with the same `ladder`"),
        ("needs: reference, tuned_as: other", "must be a method with the same `ladder`"),
        ("<<: *cached, tuned_as: target_sft_k8_same", "a tuning of its own"),
        ("<<: *cached, only: [wrong30+stong]", r"`only` of `new` names no setting: wrong30\+stong"),
        (
            "config: {method: null, trust: power, residual: prior}, needs: reference, only: [clean]",
            "makes `new` a variant",
        ),
        ("config: {method: dft}, top_k: 8", "`top_k` of `new` needs a reference"),
    ],
)
def test_settings_refuse_variants_of_nothing(fields, match, tmp_path):
    written = (settings.HERE / "settings.yaml").read_text(encoding="utf-8")
    fields = fields if "config" in fields or "<<" in fields else f"config: {{method: target_sft}}, {fields}"
    new = f"  new: {{{fields}}}\n"
    (tmp_path / "settings.yaml").write_text(written.replace("\nsettings:", f"{new}\nsettings:"), encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        settings.read(tmp_path)


# --- results ---


def _result(key: str, phase: str = TEST, **fields) -> dict:
    run = Run(phase, "chain", "clean", 0.0, "none", key, (), 0.0, 1)
    solved = {"solved": {"0": [1, 0], "1": [2, 1]}, "others": {}, "nll": 1.0, "entropy": 1.0, "seconds": 1.0}
    return {**vars(run), "key": run.key, **solved, **fields}


def test_store_keeps_whole_lines_only(tmp_path):
    study = settings.load()
    store = Store(tmp_path, study)
    first, second = _result("one"), _result("two")
    store.add(first)
    store.add(second)
    file = tmp_path / "test.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # as a full disk or a lost machine leaves it
    reopened = Store(tmp_path, study)
    assert first["key"] in reopened and second["key"] not in reopened
    reopened.add(second)
    assert Store(tmp_path, study)[second["key"]]["solved"] == second["solved"]
    assert {"session", "date"} <= set(Store(tmp_path, study)[first["key"]])
    assert reopened.sessions[0]["versions"]["trl"]


def test_store_refuses_results_of_other_settings(tmp_path):
    Store(tmp_path, settings.load())
    with pytest.raises(ValueError, match=r"`results`: .* holds results of other settings"):
        Store(tmp_path, settings.load(quick=True))


def test_store_refuses_another_method_under_a_known_name(tmp_path):
    study = settings.load()
    store = Store(tmp_path, study)
    store.add(_result("dft", method="dft"))
    again = replace(study, methods=tuple(replace(m, replica=1) if m.name == "dft" else m for m in study.methods))
    with pytest.raises(ValueError, match=r"`replica=1` of `dft`: .* holds runs of that name with 0"):
        Store(tmp_path, again)


def test_store_tells_what_its_results_were_made_with(tmp_path):
    store = Store(tmp_path, settings.load())
    store.sessions = [{"machine": f"M{name}", "versions": {"torch": name, "trl": "1"}} for name in ("3", "1", "2")]
    for key, session, day in (("one", 2, "2026-01-02"), ("two", 0, "2026-01-03"), ("three", 0, "2026-01-01")):
        store.results[key] = {"session": session, "date": day}
    assert store.origin == "M2 and M3, 2026-01-01 to 2026-01-03; torch 3 and 2, trl 1"
    store.results = {"one": store.results["one"]}
    assert store.origin == "M2, 2026-01-02; torch 2, trl 1"


@pytest.mark.slow
def test_two_studies_cannot_write_into_one_folder(tmp_path):
    command = [sys.executable, "-m", "method_comparison", "--results", str(tmp_path)]
    store = Store(tmp_path, settings.load())
    refused = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "a study is already writing into" in refused.stderr
    store.add({"phase": TUNE, "key": "this one still can"})


def test_pending_runs_begin_with_the_controls_and_leave_out_what_is_known(tmp_path):
    study = settings.load(quick=True)
    store = Store(tmp_path, study)
    first = next(pending(study, store))
    assert first == base_run(study.settings[0], TEST, study.test["seeds"][0])
    store.results[first.key] = _result("any")
    assert next(pending(study, store)) != first


def _row(*seeds: dict[str, list[int]], samples: int = 4) -> Row:
    return Row("any", tuple({"solved": solved, "others": {}} for solved in seeds), samples)


def test_accuracies_are_read_in_three_ways():
    row = _row({"0": [1, 0, 1, 1], "0.5": [4, 4, 0, 0], "1": [2, 1, 2, 3]})
    assert row.solved(GREEDY) == [[1, 0, 1, 1]]
    assert row.solved(AT_ONE) == [[0.5, 0.25, 0.5, 0.75]]
    # On the even prompts both temperatures solve half, on the odd ones 0.5 and 0.5: the first named wins.
    assert row.solved(AT_BEST) == [[1.0, 1.0, 0.0, 0.0]]


def test_best_temperature_is_chosen_on_the_other_half():
    """Each half of the prompts prefers a temperature at which the other half fails."""
    row = _row({"0": [0] * 4, "0.5": [4, 0, 4, 0], "1": [0, 4, 0, 4]})
    assert row.accuracy(AT_BEST) == 0.0
    row = _row({"0": [0] * 4, "0.5": [3, 3, 3, 3], "1": [1, 1, 1, 1]})
    assert row.accuracy(AT_BEST) == 0.75


def test_difference_is_paired_and_takes_the_larger_error():
    mine = _row({"0": [1, 1, 0, 1], "1": [0] * 4}, {"0": [1, 0, 0, 1], "1": [0] * 4})
    other = _row({"0": [1, 0, 0, 1], "1": [0] * 4}, {"0": [1, 0, 0, 0], "1": [0] * 4})
    found = difference(mine, other, GREEDY)
    values = [0, 1, 0, 0, 0, 0, 0, 1]
    assert found.value == pytest.approx(0.25)
    assert found.error == pytest.approx(statistics.stdev(values) / 8**0.5)  # both seeds agree exactly
    assert found.sign == 0
    apart = _row({"0": [1, 1, 1, 1], "1": [0] * 4}, {"0": [1, 0, 0, 0], "1": [0] * 4})
    found = difference(apart, other, GREEDY)
    assert found.error == pytest.approx(statistics.stdev([0.5, 0.0]) / 2**0.5)


def test_trainings_that_settings_share_are_compared_once():
    study = settings.load()
    shared = {name: Row(name, ({"key": name},), 4) for name in ("sft", "dft")}
    tested = object.__new__(analysis.Tested)
    tested.study = study
    tested._rows = {setting.name: {} for setting in study.settings}
    for name in ("wrong30", "wrong30+strong"):
        tested._rows[name] = {**shared, "asft": Row("asft", ({"key": f"asft {name}"},), 4)}
    assert [setting.name for setting in tested.compared("dft", "sft")] == ["wrong30"]
    assert [setting.name for setting in tested.compared("asft", "sft")] == ["wrong30", "wrong30+strong"]
    assert tested.compared("sft", "sft") == tested.compared("gem", "sft") == []


def test_one_choice_everywhere_is_judged_by_all_but_controls():
    """Two settings, each solved by another method; the control is right everywhere and judges nobody."""
    study = settings.load()
    right, wrong = {"0": [1] * 16, "1": [4] * 16}, {"0": [0] * 16, "1": [0] * 16}
    tested = object.__new__(analysis.Tested)
    tested.study, tested.store, tested._cells = study, {}, []
    tested._rows = {setting.name: {} for setting in study.settings}

    def row(name: str, solved: dict[str, list[int]], score: float) -> Row:
        return Row(name, ({"solved": solved, "others": {}},) * 2, 4, tuning_score=score)

    tested._rows["unseen"] = {"sft": row("sft", right, 0.9), "dft": row("dft", wrong, 0.5)}
    tested._rows["wrong30"] = {"sft": row("sft", wrong, 0.6), "dft": row("dft", right, 0.7)}
    tested._rows["wrong30"]["sft_again"] = row("sft_again", right, 0.99)
    tested._rows["clean"] = {"asft": row("asft", right, 0.9)}
    tested._rows["unseen"]["target_sft_k8"] = row("target_sft_k8", right, 0.99)  # a variant: not to be chosen
    tested._rows["gcd"] = {"sft_again": row("sft_again", right, 0.99)}  # nothing to choose, and no judge
    found = {choice.name: choice for choice in everywhere.choices(tested)}
    assert next(iter(found)) in (everywhere.CHOOSER, "sft_again") and "target_sft_k8" not in found
    for name, count, unbeaten, regret, behind_sft in (
        (everywhere.CHOOSER, 3, 3, 0.0, 0.0),
        ("sft", 2, 1, 0.5, 0.0),
        ("dft", 2, 1, 0.5, 1.0),
        ("sft_again", 1, 1, 0.0, 0.0),
        ("asft", 1, 1, 0.0, None),
    ):
        assert found[name].settings == count
        assert found[name].unbeaten == (unbeaten,) * 3 and found[name].regret == (regret,) * 3, name
        assert found[name].behind_sft == (behind_sft,) * 3, name
    assert "| `asft` | 1 of 1 | 1 of 1 | 1 of 1 | 0.0 | 0.0 | 0.0 |  |  |  |" in tables.everywhere_table(tested)


def test_fair_chooser_takes_sft_unless_something_is_better_beyond_its_error():
    study, samples = settings.load(), settings.load().tuning["samples"]
    tested = SimpleNamespace(study=study)
    rows = [Row(name, (), samples) for name in ("sft", "dft", "asft")]

    def result(greedy: list[int], sampled: list[int]) -> dict:
        return {"solved": {"0": greedy, "1": sampled}}

    half, all_of = [0, 1] * 8, [1] * 16
    sampled = [samples * each for each in half]
    sft = (result(half, sampled), result(half, sampled))
    # Better greedy on both seeds, and no better at temperature 1.
    sharp = (result(all_of, sampled), result(all_of, sampled))
    # As good on average, but on one of the two seeds alone.
    lucky = (result(all_of, [samples] * 16), result(half, sampled))

    def taken(finals: dict, measure: str) -> str:
        return everywhere._fair(finals, rows, measure, tested).name

    assert taken({"dft": sharp, "sft": sft}, GREEDY) == "dft"
    assert taken({"dft": sharp, "sft": sft}, AT_ONE) == "sft"
    assert taken({"asft": lucky, "sft": sft}, GREEDY) == taken({"asft": lucky, "sft": sft}, AT_BEST) == "sft"
    assert taken({"asft": lucky, "dft": sharp, "sft": sft}, AT_BEST) == "dft"
    assert everywhere._fair({}, rows, GREEDY, tested) is None


def test_committed_page_says_what_the_committed_results_say(tmp_path):
    study = settings.load()
    made = page.write(study, Store(COMMITTED, study, writable=False), tmp_path, page.TEMPLATE)
    assert made.read_text(encoding="utf-8") == (settings.HERE / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"\((figures/.+?)\)", made.read_text(encoding="utf-8"))
    assert figures and all((settings.HERE / figure).is_file() for figure in figures)


def test_page_says_which_settings_are_missing():
    study = settings.load()
    tested = analysis.Tested(study, {})
    assert "of 14 settings, 14 are still to be measured" in page.coverage(tested)


def test_tuning_score_weighs_greedy_and_sampled_alike():
    study = settings.load()
    result = {"solved": {"0": [1, 0], "1": [4, 4]}, "others": {"gcd": [0.0, 0.0]}}
    plain, weighed = SimpleNamespace(others_weight=0.0), SimpleNamespace(others_weight=0.5)
    assert study.tuning["samples"] == 4
    assert score(result, plain, study) == 0.75
    assert score(result, weighed, study) == 0.375


# --- the whole of it ---


@pytest.mark.slow
def test_quick_study_runs_and_goes_on_after_it_was_killed(tmp_path):
    """From nothing to the page, killed on the way with whatever it had started. Takes about ten minutes."""
    results = tmp_path / "results"
    command = [sys.executable, "-m", "method_comparison", "--quick", "--results", str(results)]
    tuned, log = results / "tuning.jsonl", tmp_path / "log"
    job = start(command, log)
    try:
        while not (tuned.is_file() and tuned.read_bytes().count(b"\n") >= 5):
            assert job.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        end(job)
    before = tuned.read_bytes()
    models = {path: path.stat().st_mtime_ns for path in results.glob("models/*/model.safetensors")}
    finish(start(command, log), log, timeout=1500)
    after = tuned.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1]), "what was known was not run again"
    assert {path: path.stat().st_mtime_ns for path in models} == models
    study = settings.load(quick=True)
    store = Store(results, study, writable=False)
    lines = [json.loads(line)["key"] for name in ("tuning", "test") for line in _lines(results / f"{name}.jsonl")]
    assert len(lines) == len(set(lines)) == len(store.results)
    assert not list(pending(study, store))
    written = (results / "README.md").read_text()
    for method in study.methods:
        assert f"| `{method.name}` |" in written
    for figure in re.findall(r"\((figures/.+?)\)", written):
        assert (results / figure).stat().st_size > 10_000
    # Every prompt has a count within its samples, from every run.
    for result in store.results.values():
        options = study.tuning if result["phase"] == TUNE else study.test
        for temperature, counts in result["solved"].items():
            assert len(counts) == options["prompts"]
            assert all(0 <= count <= (1 if temperature == "0" else options["samples"]) for count in counts)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
