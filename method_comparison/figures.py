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
    """Accuracy by the share of demonstrations with a wrong step."""
    settings = [setting for setting in tested.study.settings if setting.name in ("clean", "wrong10", "wrong30")]
    shares = [100 * setting.share for setting in settings]
    figure, grid = plt.subplots(1, len(MEASURES), figsize=(13, 4), sharey=True)
    colours = plt.get_cmap("tab20")
    for axes, measure in zip(grid, MEASURES, strict=True):
        for number, method in enumerate(tested.study.common_methods):
            rows = [tested.row(setting, method.name) for setting in settings]
            if rows and all(rows):
                values = [100 * row.accuracy(measure) for row in rows]
                axes.plot(shares, values, marker="o", label=method.name, color=colours(number))
        if settings and (base := tested.row(settings[0], BASE)):
            axes.axhline(100 * base.accuracy(measure), color="grey", linestyle=":", label="untrained base")
        axes.set_title(measure, fontsize=10)
        axes.set_xlabel("demonstrations with a wrong step, %")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("accuracy, %")
    grid[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def _forgetting(tested: Tested) -> Any:
    """Accuracy on the narrow task against accuracy on all others."""
    figure, axes = plt.subplots(figsize=(6.5, 5))
    for setting in tested.study.settings:
        for row in tested.rows(setting) if setting.others_weight else ():
            if row.others is not None:
                axes.scatter(100 * row.others, 100 * row.accuracy(AT_BEST), s=18)
                axes.annotate(row.name, (100 * row.others, 100 * row.accuracy(AT_BEST)), fontsize=7)
    axes.set_xlabel("accuracy on the other tasks, %")
    axes.set_ylabel("accuracy on the narrow task, %")
    axes.grid(alpha=0.3)
    return figure


FIGURES = {"differences": _differences, "rates": _rates, "noise": _noise, "forgetting": _forgetting}
