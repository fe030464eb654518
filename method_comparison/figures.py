"""Figures of the page, made from the result files alone."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt

from .analysis import AT_BEST, BASE, MEASURES, Tested, difference


def draw(name: str, tested: Tested, directory: Path) -> Path:
    """Draw a figure into `directory / figures`.

    Raises:
        ValueError: there is no figure of that name.
    """
    if name not in FIGURES:
        raise ValueError(f"`{name}` is unknown: choose one of {', '.join(FIGURES)}.")
    path = directory / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = FIGURES[name](tested)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def _differences(tested: Tested) -> Any:
    """Methods by settings, coloured by the difference to SFT; a dot where it lies beyond two standard errors."""
    settings = tested.settings("sft")
    names = [method.name for method in tested.study.common_methods if method.name != "sft"]
    figure, axes = plt.subplots(figsize=(1.2 + 0.75 * len(settings), 1 + 0.36 * len(names)))
    image = None
    for line, name in enumerate(names):
        for setting in tested.compared(name, "sft"):
            column = settings.index(setting)
            found = difference(tested.row(setting, name), tested.row(setting, "sft"), AT_BEST)
            image = axes.scatter(
                column, line, s=420, marker="s", c=[100 * found.value], cmap="RdBu", vmin=-20, vmax=20
            )
            weight = "bold" if found.sign else "normal"
            shade = "white" if abs(found.value) > 0.13 else "black"
            text = f"{100 * found.value:+.0f}"
            axes.text(column, line, text, ha="center", va="center", fontsize=8, weight=weight, color=shade)
    axes.set_xticks(range(len(settings)), [setting.name for setting in settings], rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title("Accuracy minus that of sft, in points (bold: beyond 2 SE)", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, label="points", fraction=0.03)
    return figure


def _rates(tested: Tested) -> Any:
    """Tuning score by learning rate, each method in its settings."""
    names = [method.name for method in tested.study.common_methods]
    columns = 5
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(13, 2.4 * lines), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for curve in tested.rate_curves(name):
            axes.plot(list(curve), list(curve.values()), marker=".", linewidth=1, alpha=0.7)
        axes.set_xscale("log")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("learning rate")
    figure.supylabel("tuning score")
    figure.tight_layout()
    return figure


def _noise(tested: Tested) -> Any:
    """Accuracy of each method by the share of demonstrations with a wrong step, the best with most of them first."""
    settings = [setting for setting in tested.study.settings if setting.name in ("clean", "wrong10", "wrong30")]
    found = {
        method.name: [tested.row(setting, method.name) for setting in settings]
        for method in tested.study.common_methods
    }
    rows = {name: mine for name, mine in found.items() if mine and all(mine)}
    names = sorted(rows, key=lambda name: -rows[name][-1].accuracy(AT_BEST))
    figure, grid = _panels(names, [f"accuracy, %, {measure}" for measure in MEASURES])
    base = tested.row(settings[0], BASE) if settings else None
    for axes, measure in zip(grid, MEASURES, strict=True):
        values = {name: [100 * row.accuracy(measure) for row in rows[name]] for name in names}
        for line, name in enumerate(names):
            axes.plot([min(values[name]), max(values[name])], [line, line], color="lightgrey", zorder=1)
        for column, (setting, colour) in enumerate(zip(settings, ("#2166ac", "#f4a582", "#b2182b"), strict=False)):
            label = f"{100 * setting.share:g}% with a wrong step"
            axes.scatter([values[name][column] for name in names], range(len(names)), color=colour, s=24, label=label)
        if base is not None:
            axes.axvline(100 * base.accuracy(measure), color="grey", linestyle=":", label="untrained base")
    _legend(grid)
    return figure


def _forgetting(tested: Tested) -> Any:
    """Accuracy on the narrow task and on all others; the method that keeps most of the others comes first."""
    rows = {
        row.name: row
        for setting in tested.study.settings
        if setting.others_weight
        for row in tested.rows(setting)
        if row.others is not None
    }
    base = rows.pop(BASE, None)
    names = sorted(rows, key=lambda name: -rows[name].others)
    figure, grid = _panels(names, ["accuracy on the other tasks, %", "accuracy on the narrow task, %"])
    for axes, value in zip(grid, (lambda row: row.others, lambda row: row.accuracy(AT_BEST)), strict=True):
        axes.scatter([100 * value(rows[name]) for name in names], range(len(names)), s=24)
        if base is not None:
            axes.axvline(100 * value(base), color="grey", linestyle=":", label="untrained base")
    _legend(grid)
    return figure


def _panels(names: list[str], titles: list[str]) -> tuple[Any, Any]:
    """Panels side by side that share their lines, one for each method."""
    size = (1.5 + 3.6 * len(titles), 1 + 0.24 * len(names))
    figure, grid = plt.subplots(1, len(titles), figsize=size, sharey=True)
    for axes, title in zip(grid, titles, strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    figure.tight_layout()
    return figure, grid


def _legend(grid: Any) -> None:
    """Beside the last panel, where it covers nothing."""
    if grid[-1].get_legend_handles_labels()[0]:
        grid[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


FIGURES = {"differences": _differences, "rates": _rates, "noise": _noise, "forgetting": _forgetting}
