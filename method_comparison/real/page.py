"""The page of the real model: tables and a figure, made from the result files alone."""

from collections import Counter
from pathlib import Path

from trl_qtarget.files import replacing

from .. import claims, prose
from ..analysis import AT_ONE, BASE, GREEDY, Row, Tested
from ..evaluation import mean
from ..settings import Setting
from ..store import Store
from ..study import pending, total_runs
from ..tables import percent, points, table
from . import figure
from .analysis import AGAIN, MEASURES, WORDS, Found, RealTested, accuracy, against_sft, pairs, small_tested
from .settings import RealStudy


FIGURE = "figures/real.png"


def write(study: RealStudy, store: Store, directory: Path, words: str = "") -> Path:
    """Write README.md and its figure into a folder.

    Args:
        words: what was found, in Markdown with the marks of `claims`; it goes before the tables.

    Returns:
        The path of the page.

    Raises:
        ValueError: there are no results, or they contradict the words.
    """
    if not store.results:
        raise ValueError(f"`results`: {store.directory} holds no results to write about.")
    tested, small = RealTested(study, store), small_tested()
    (directory / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    figure.draw(tested, small, directory / FIGURE)
    parts = [
        "# The comparison on a real model",
        facts(study, store),
        prose.filled(words, lambda mark: _said(mark, tested)),
        "## Every setting",
        _READING.format(samples=study.test["samples"]),
        *(f"### `{each.name}`: {each.title}\n\n{setting_table(each, tested)}" for each in study.settings),
        "## What chance does",
        "`sft_again` is `sft` with other demonstrations and another order, tuned anew; minus `sft`, in points.",
        chance_table(tested),
        "## Where it agrees with the small models, and where not",
        _AGREEMENT,
        *(
            f"{agreement_summary(tested, small, measure)}\n\n{agreement_table(tested, small, measure)}"
            for measure in MEASURES
        ),
        f"![differences]({FIGURE})",
    ]
    path = directory / "README.md"
    with replacing(path) as whole:
        whole.write_text(prose.wrapped("\n\n".join(part for part in parts if part)), encoding="utf-8")
    return path


def _said(mark: str, tested: RealTested) -> str:
    if (claim := claims.say(mark, tested)) is None:
        raise ValueError(f"`{{{{{mark}}}}}` is no claim: see `method_comparison/claims.py`.")
    return claim


_READING = """\
Accuracy in percent, greedy and Average@{samples} at temperature 1, ± one standard error over prompts. Differences to
plain SFT are in points, paired by prompt, ± one standard error, by the rule of `trl-qtarget tune` (the variance
between trainings is that of all methods together); SFT is the mean of `sft` and `sft_again`. Bold: less likely than 5%
where there is no difference (Student's t, both sides). † the best learning rate is the lowest or highest tried.
*Other task*: accuracy, the mean of greedy and sampled, and its change from the base. *KL*: of the model from the base
on right solutions of the other task, nats per token. *a*: the exponent that `adaptive_sft` measured."""

_AGREEMENT = """\
Differences to plain SFT in points, on small models ([the comparison](../README.md), the setting of the same name;
beyond two standard errors in bold) and here. """ + "; ".join(
    f"*{word}*: {meaning}" for word, meaning in WORDS.items()
)


def facts(study: RealStudy, store: Store) -> str:
    """Where the numbers come from, and how much of the study is done."""
    results = store.results.values()
    seconds = sorted(result["seconds"] for result in results)
    left = len({run.key for run in pending(study, store)})
    total = max(total_runs(study), len(results))
    done = (
        f"All {len(results)} runs are done."
        if not left
        else (
            f"**Not complete yet:** {len(results)} of {total} runs are done. `make comparison-real` goes on with them."
        )
    )
    model = f"{study.model['name']}, weights in {study.model['dtype']}, LoRA"
    made = f"{len(results)} runs of {seconds[len(seconds) // 2] / 60:.1f} minutes (median)"
    return f"{model}; {made}; {store.origin}.\n\n{done}"


def setting_table(setting: Setting, tested: Tested) -> str:
    """Everything measured in one setting."""
    base = tested.row(setting, BASE)
    differences = {measure: against_sft(setting, tested, measure) for measure in MEASURES}
    heads = ["method", "learning rate", *MEASURES, *(f"− sft, {measure}" for measure in MEASURES)]
    heads += ["NLL", "entropy", "other task", "KL"]
    lines = []
    for row in sorted(tested.rows(setting), key=lambda row: (row.name != BASE, -_both(row))):
        accuracies = [accuracy(row, measure) for measure in MEASURES]
        lines.append(
            [
                row.name if row.name == BASE else f"`{row.name}`" + _alpha(row),
                _rate(row),
                *(f"{percent(each.value)} ± {percent(each.error)}" for each in accuracies),
                *(
                    _cell(found[row.name]) if row.name in found and row.name != AGAIN else ""
                    for found in differences.values()
                ),
                f"{row.mean('nll'):.3f}",
                f"{row.mean('entropy'):.3f}",
                _others(row, base),
                "" if row.name == BASE else _kl(row),
            ]
        )
    return table(heads, lines) if lines else "Not measured yet."


def _both(row: Row) -> float:
    return row.accuracy(GREEDY) + row.accuracy(AT_ONE)


def _alpha(row: Row) -> str:
    measured = [result["alpha"] for result in row.results if "alpha" in result]
    return f" (a = {mean(measured):.2f})" if measured else ""


def _rate(row: Row) -> str:
    return "" if row.learning_rate is None else f"{row.learning_rate:.2g}" + (" †" if row.on_edge else "")


def _others(row: Row, base: Row | None) -> str:
    if base is None or row is base:
        return percent(row.others)
    return f"{percent(row.others)} ({points(row.others - base.others)})"


def _kl(row: Row) -> str:
    known = [result["kl"] for result in row.results]
    return "diverged" if None in known else f"{mean(known):.3f}"


def _cell(found: Found) -> str:
    text = f"{points(found.value)} ± {percent(found.error)}"
    return f"**{text}**" if found.sign else text


def chance_table(tested: Tested) -> str:
    """`sft_again` minus `sft` in each setting."""
    lines = []
    for setting in tested.study.settings:
        cells = [against_sft(setting, tested, measure).get(AGAIN) for measure in MEASURES]
        if all(cells):
            lines.append([f"`{setting.name}`", *map(_cell, cells)])
    return table(["setting", *MEASURES], lines) if lines else "Not measured yet."


def agreement_table(tested: Tested, small: Tested, measure: str) -> str:
    """Every method and kind of demonstrations that were measured on small models and on the real one."""
    lines = [
        [f"`{each.setting}`", f"`{each.method}`", _cell(each.small), _cell(each.real), each.word]
        for each in pairs(tested, small, measure)
    ]
    return table(["setting", "method", "small models", "real model", measure], lines) if lines else "Not measured yet."


def agreement_summary(tested: Tested, small: Tested, measure: str) -> str:
    """How often each word stands in the table; without `sft_again`, of which nothing is expected."""
    words = Counter(each.word for each in pairs(tested, small, measure) if each.method != AGAIN)
    counts = ", ".join(f"{word} {words[word]}" for word in WORDS)
    return f"**{measure}**: of {words.total()} differences, {counts}."
