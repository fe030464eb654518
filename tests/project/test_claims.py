"""Sentences of the comparison's page, of the README and of the documentation say what the results say."""

import re
from pathlib import Path

import pytest

from method_comparison import analysis, claims, prose, settings
from method_comparison.__main__ import COMMITTED
from method_comparison.analysis import Row
from method_comparison.real import settings as real_settings
from method_comparison.real.__main__ import COMMITTED as REAL
from method_comparison.real.analysis import RealTested, against_sft
from method_comparison.store import Store


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tested() -> analysis.Tested:
    study = settings.load()
    return analysis.Tested(study, Store(COMMITTED, study, writable=False))


@pytest.fixture
def made() -> analysis.Tested:
    """`dft` solves all 16 prompts, `sft` none, the control all; in `gcd` nothing differs."""
    found = object.__new__(analysis.Tested)
    found.study, found.store, found._cells = settings.load(), {}, []
    found._rows = {setting.name: {} for setting in found.study.settings}

    def row(name: str, right: int, knob: str = "") -> Row:
        solved = [1] * right + [0] * (16 - right)
        result = {"solved": {"0": solved, "1": [4 * each for each in solved]}, "others": {"gcd": [0.25, 0.75]}}
        return Row(name, (result,), 4, knob=knob, tuning_score=right / 16)

    found._rows["wrong30"] = {
        "sft": row("sft", 0),
        "dft": row("dft", 16),
        "asft": row("asft", 2, "lam = 0.05"),
        "profit": row("profit", 1, "tau = 0.1"),
        "sft_again": row("sft_again", 16),
        "base": row("base", 8),
    }
    found._rows["gcd"] = {"sft": row("sft", 4), "dft": row("dft", 4), "base": row("base", 4)}
    return found


@pytest.mark.parametrize(
    ("mark", "said"),
    {
        "dft far above sft in wrong30": "100.0 ± 0.0",
        "dft far above sft in wrong30 at T=1 bare": "100.0",
        "sft below dft in wrong30 at greedy": "100.0 ± 0.0",
        "asft slightly above sft in wrong30 bare": "12.5",
        "asft|profit above sft in wrong30 at T=1|greedy": "6.2 to 12.5",
        "dft above base in wrong30 bare": "50.0",
        "nobody far above sft in gcd at best|greedy": "no method",
        "all far above sft in wrong30": "`dft`",
        "all far above sft in wrong30 at T=1|greedy": "`dft`",
        "how many far above sft in wrong30": "1 of 3",
        "how many with a reference far above sft in wrong30": "0 of 1",
        "accuracy of base in wrong30": "50.0",
        "accuracy of base in wrong30|gcd at greedy": "25.0 to 50.0",
        "others of dft in gcd": "50.0",
        "knob of asft in wrong30": "0.05",
        "knob of asft|profit in wrong30": "0.05 to 0.1",
        "unbeaten sft": "1 of 2",
        "beaten sft at T=1": "1 of 2",
        "unbeaten dft at greedy": "2 of 2",
        "unbeaten the best in tuning": "2 of 2",
        "regret sft": "50.0",
        "behind sft dft": "0.0",
    }.items(),
)
def test_mark_becomes_what_the_results_say(made, mark, said):
    assert claims.say(mark, made) == said


@pytest.mark.parametrize(
    ("mark", "error"),
    {
        "dft below sft in wrong30": "`dft` is not below: +100.0 ± 0.0",
        "dft above sft in gcd": "`dft` is not above",
        "asft far above sft in wrong30": "`asft` is not far above: +12.5 ± ",
        "dft slightly above sft in wrong30": "`dft` is not slightly above",
        "dft|asft far above sft in wrong30": "`asft` is not far above",
        "dft above sft in wrong30|gcd": "`dft` is not above",
        "nobody far above sft in wrong30": "`dft` is: +100.0",
        "all far below sft in wrong30": "no method is far below",
        "gem above sft in wrong30": "`gem` was not tested in `wrong30`",
        "dft above sft in wrong40": "there is no setting `wrong40`",
        "dft above sft in wrong30 at T=2": "there is no measure `T=2`",
        "unbeaten gem": "there is no choice `gem`",
    }.items(),
)
def test_mark_that_the_results_contradict_is_refused(made, mark, error):
    with pytest.raises(ValueError, match=re.escape(error)) as refused:
        claims.say(mark, made)
    assert "{{" + mark + "}}" in str(refused.value)


def test_other_marks_are_no_claims(made):
    assert all(claims.say(mark, made) is None for mark in ("differences:sft:best T", "figure:noise", "facts"))


def test_real_model_is_judged_by_its_own_rule():
    study = real_settings.load()
    tested = RealTested(study, Store(REAL, study, writable=False))
    setting = next(each for each in study.settings if each.name == "sums-wrong30")
    found = against_sft(setting, tested, analysis.AT_ONE)["dft"]
    said = claims.say("dft far above sft in sums-wrong30 at T=1", tested)
    assert found.sign == 1 and said == f"{100 * found.value:.1f} ± {100 * found.error:.1f}"
    with pytest.raises(ValueError, match="`dft` was not tested against `base`"):
        claims.say("dft above base in sums-wrong30 at T=1", tested)


def test_lines_have_one_width_and_tables_stay():
    table = "| a | b |\n| --- | ---: |\n| 1 |  |"
    items = "- one {{first\n  mark}} two\n- " + "long " * 40 + "\n  end"
    text = prose.filled(f"# Title\n\n{items}\n\n{table}\n", str.upper)
    lines = prose.wrapped(text).splitlines()
    assert lines[:3] == ["# Title", "", "- one FIRST MARK two"] and lines[3].startswith("- long")
    assert lines[4].startswith("  long") and lines[4].endswith("long end") and max(map(len, lines)) <= 119
    assert "\n".join(lines[-3:]) == table


# Sentences of other documents, with marks for what they quote.
QUOTES = {
    "README.md": [
        "nothing but `mask_target` beat `sft`, by {{mask_target far above sft in clean}} points, "
        "which `sft` once more did",
        "never more than {{behind sft adaptive_sft at T=1|best}} points below `sft` when sampled and "
        "{{behind sft adaptive_sft at greedy}} greedy in 13 settings",
        "in {{beaten adaptive_sft}} another method beat it in some measure",
    ],
    "docs/choosing.md": [
        "`mask_target`, {{mask_target far above sft in clean}} points in `clean` and not in `narrow`",
        "the farthest above `sft` greedy, {{mask_target far above sft in wrong30 at greedy}} points",
        "`dft` ended {{dft far below sft in unseen bare}} points below `sft`, `infosft` "
        "{{infosft far below sft in unseen bare}}, `prift` {{prift far below sft in unseen bare}}; `iw_sft` "
        "{{iw_sft far above sft in unseen bare}} above",
        "it was never more than {{behind sft adaptive_sft at T=1|best}} points below tuned `sft` when sampled and "
        "{{behind sft adaptive_sft at greedy}} greedy",
        "in {{beaten adaptive_sft}} another method beat it in some measure",
        "{{infosft far above sft in wrong30}} points above `sft` with wrong steps, "
        "{{infosft far below sft in unseen}} below in a new notation",
        "With wrong steps {{saft far above sft in wrong30}} points above `sft`",
        "On right labels {{deft far below sft in clean}} points below `sft`",
        "{{rank_tuner far above sft in wrong30}} points above `sft`, in a new notation "
        "{{rank_tuner slightly above sft in unseen}}",
        "With wrong steps {{idft slightly above sft in wrong30}} points above `sft`",
        "{{prift far above sft in wrong30}} points above `sft` with wrong steps",
        "{{gift far above sft in wrong30|skipped}} points above `sft`",
        "Greedy {{mask_target above sft in clean|wrong10|wrong30|answers30 at greedy}} points above `sft`",
        "were {{tofu far below sft in clean|wrong10|wrong30|unseen|answers30 at T=1}} points below those of `sft`",
    ],
}


@pytest.mark.parametrize(("path", "quote"), [(path, quote) for path, quotes in QUOTES.items() for quote in quotes])
def test_documents_quote_the_results(tested, path, quote):
    said = re.sub(r"\{\{(.+?)\}\}", lambda found: claims.say(found[1], tested), quote)
    assert said in " ".join((ROOT / path).read_text(encoding="utf-8").split())
