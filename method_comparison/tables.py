"""Tables of the page, in Markdown, made from the result files alone."""

import statistics
from collections.abc import Callable

from .analysis import AT_BEST, BASE, MEASURES, TEACHER, Difference, Row, Tested, difference
from .everywhere import RULES, choices
from .settings import Setting


CONTROLS = (BASE, TEACHER)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns but the first are aligned right."""
    aligned = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, aligned, *lines])


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def _percent_or_none(value: float | None) -> str:
    return "" if value is None else percent(value)


def points(value: float) -> str:
    """Percentage points, signed; a true minus sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def _against(row: Row, baseline: Row, measure: str) -> str:
    """A difference in points with its error, bold beyond two of them."""
    found = difference(row, baseline, measure)
    text = f"{points(found.value)} ± {100 * found.error:.1f}"
    return f"**{text}**" if found.sign else text


def setting_table(setting: Setting, tested: Tested) -> str:
    """Everything measured in one setting."""
    sft, base = tested.row(setting, "sft"), tested.row(setting, BASE)
    heads = ["method", "knob", "learning rate", *MEASURES, "− sft, best T", "NLL", "entropy", "other tasks"]
    lines = []
    for row in sorted(tested.rows(setting), key=lambda row: (row.name not in CONTROLS, -row.accuracy(AT_BEST))):
        rate = "" if row.learning_rate is None else f"{row.learning_rate:.2g}" + (" †" if row.on_edge else "")
        accuracies = [percent(row.accuracy(measure)) for measure in MEASURES]
        accuracies[1] += f" ({row.best_temperature})"
        lines.append(
            [
                f"`{row.name}`" if row.name not in CONTROLS else row.name,
                row.knob,
                rate,
                *accuracies,
                _against(row, sft, AT_BEST) if sft and row is not sft else "",
                f"{row.mean('nll'):.3f}",
                f"{row.mean('entropy'):.3f}",
                _others(row, base),
            ]
        )
    return table(heads, lines)


def _others(row: Row, base: Row | None) -> str:
    if row.others is None:
        return ""
    if base is None or base.others is None or row is base:
        return percent(row.others)
    return f"{percent(row.others)} ({points(row.others - base.others)})"


def difference_table(tested: Tested, baseline: str, measure: str) -> str:
    """Methods by settings: difference to a baseline, bold beyond two standard errors; each pair of trainings once."""
    settings, lines = tested.settings(baseline), []
    for name in [BASE, *(method.name for method in tested.study.common_methods)]:
        compared = tested.compared(name, baseline)
        if compared:
            cells = [
                _against(tested.row(setting, name), tested.row(setting, baseline), measure)
                if setting in compared
                else ""
                for setting in settings
            ]
            lines.append([f"`{name}`" if name != BASE else name, *cells])
    accuracies = [percent(tested.row(setting, baseline).accuracy(measure)) for setting in settings]
    heads = ["method", *(setting.name for setting in settings)]
    return table(heads, [[f"`{baseline}` itself", *accuracies], *lines])


def wins_table(tested: Tested, baseline: str) -> str:
    """In how many settings each method beats a baseline, or loses to it, under each measure and under two of them.

    The median is that of the differences at the best temperature: a mean would show the one setting that went astray.
    """
    lines = []
    for method in tested.study.common_methods:
        found = _differences(method.name, tested, baseline)
        if not found:
            continue
        signs = [[difference.sign for difference in measures] for measures in found]
        middle = statistics.median(measures[MEASURES.index(AT_BEST)].value for measures in found)
        cells = []
        for number in range(len(MEASURES)):
            column = [each[number] for each in signs]
            cells.append(f"{column.count(1)} / {column.count(0)} / {column.count(-1)}")
        held = [1 if s.count(1) > 1 and -1 not in s else -1 if s.count(-1) > 1 and 1 not in s else 0 for s in signs]
        doubtless = f"**{held.count(1)} / {held.count(-1)}**"
        lines.append([f"`{method.name}`", str(len(signs)), *cells, doubtless, points(middle)])
    return table(["method", "settings", *MEASURES, "beyond doubt: wins / losses", "median, best T"], lines)


def _differences(name: str, tested: Tested, baseline: str) -> list[list[Difference]]:
    """For each setting with both, the difference under each measure."""
    pairs = [(tested.row(s, name), tested.row(s, baseline)) for s in tested.compared(name, baseline)]
    return [[difference(row, other, measure) for measure in MEASURES] for row, other in pairs]


def everywhere_table(tested: Tested) -> str:
    """How well one choice does in all settings, the best first."""
    lines = []
    for choice in choices(tested):
        name = choice.name if choice.name in RULES else f"`{choice.name}`"
        unbeaten = [f"{count} of {choice.settings}" for count in choice.unbeaten]
        lines.append([name, *unbeaten, *map(_percent_or_none, (*choice.regret, *choice.behind_sft))])
    heads = [f"{what}, {measure}" for what in ("unbeaten", "regret", "behind `sft`") for measure in MEASURES]
    heads = ["always", *heads]
    return table(heads, lines)


def choices_table(tested: Tested, cell: Callable[[Row], str]) -> str:
    """Methods by settings: what tuning chose."""
    settings, lines = tested.study.settings, []
    for method in tested.study.common_methods:
        rows = [tested.row(setting, method.name) for setting in settings]
        if any(rows):
            lines.append([f"`{method.name}`", *(cell(row) if row else "" for row in rows)])
    return table(["method", *(setting.name for setting in settings)], lines)


def rates_table(tested: Tested) -> str:
    """The learning rates that tuning chose, in units of 1e-3."""
    return choices_table(tested, lambda row: f"{1e3 * row.learning_rate:.2g}" + (" †" if row.on_edge else ""))


def ratios_table(tested: Tested) -> str:
    """The learning rates that tuning chose, as multiples of that of plain SFT, which was tuned twice.

    Settings in which one of the two lies on an edge say nothing: there `sft` was best at not being trained.
    """
    rates = {}
    for setting in tested.study.settings:
        twice = [tested.row(setting, name) for name in ("sft", "sft_again")]
        if all(row and not row.on_edge for row in twice):
            rates[setting] = statistics.geometric_mean(row.learning_rate for row in twice)
    lines = []
    for method in tested.study.common_methods:
        shared = [setting for setting in tested.compared(method.name, "sft") if setting in rates]
        ratios = [tested.row(setting, method.name).learning_rate / rates[setting] for setting in shared]
        if len(ratios) > 1:
            first, middle, third = statistics.quantiles(ratios, n=4, method="inclusive")
            lines.append([f"`{method.name}`", str(len(ratios)), f"{middle:.1f}", f"{first:.1f} to {third:.1f}"])
    return table(["method", "settings", "median, × the rate of `sft`", "middle half"], lines)


def variants_table(tested: Tested) -> str:
    """Methods that only some settings take, each beside the method of which it is a variant."""
    lines = []
    for variant in (method for method in tested.study.methods if method.only):
        original = variant.original
        for setting in (each for each in tested.study.settings if each.name in variant.only):
            row, other = tested.row(setting, variant.name), tested.row(setting, original)
            if row and other:
                cells = [_against(row, other, measure) for measure in MEASURES]
                lines.append([f"`{variant.name}`", setting.name, f"`{original}`", *cells])
    return table(["method", "setting", "minus", *MEASURES], lines)


def knobs_table(tested: Tested) -> str:
    """The knobs that tuning chose."""
    return choices_table(tested, lambda row: row.knob.partition(" = ")[2])


def models_table(tested: Tested) -> str:
    """The untrained bases and the teachers on each task."""
    lines, seen = [], set()
    for setting in tested.study.settings:
        for row in tested.rows(setting):
            name = row.name if row.name == BASE else f"{setting.reference} teacher"
            if row.name in CONTROLS and (name, setting.task) not in seen:
                seen.add((name, setting.task))
                values = [percent(row.accuracy(measure)) for measure in MEASURES]
                lines.append([setting.task, name, *values, f"{row.mean('nll'):.3f}", f"{row.mean('entropy'):.3f}"])
    return table(["task", "model", *MEASURES, "NLL", "entropy"], sorted(lines))
