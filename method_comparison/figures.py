"""Figures of the page, made from the result files alone."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt

from . import analysis
from .analysis import AT_BEST, BASE, difference
from .settings import Study
from .store import Store
from .study import cells


def draw(name: str, study: Study, store: Store, directory: Path) -> Path:
    """Draw a figure into `directory / figures`.

    Raises:
        ValueError: there is no figure of that name.
    """
    if name not in FIGURES:
        raise ValueError(f"`{name}` is unknown: choose one of {', '.join(FIGURES)}.")
    path = directory / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = FIGURES[name](study, store)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def _differences(study: Study, store: Store) -> Any:
    """Methods by settings, coloured by the difference to SFT; a dot where it lies beyond two standard errors."""
    settings = [(setting, analysis.rows(setting, study, store)) for setting in study.settings]
    settings = [(setting, {row.name: row for row in rows}) for setting, rows in settings]
    settings = [(setting, rows) for setting, rows in settings if "sft" in rows]
    names = [method.name for method in study.methods if method.name != "sft"]
    figure, axes = plt.subplots(figsize=(1.2 + 0.75 * len(settings), 1 + 0.36 * len(names)))
    image = None
    for column, (_, rows) in enumerate(settings):
        for line, name in enumerate(names):
            if name not in rows:
                continue
            found = difference(rows[name], rows["sft"], AT_BEST)
            image = axes.scatter(
                column, line, s=420, marker="s", c=[100 * found.value], cmap="RdBu", vmin=-20, vmax=20
            )
            weight = "bold" if found.sign else "normal"
            shade = "white" if abs(found.value) > 0.13 else "black"
            text = f"{100 * found.value:+.0f}"
            axes.text(column, line, text, ha="center", va="center", fontsize=8, weight=weight, color=shade)
    axes.set_xticks(range(len(settings)), [setting.name for setting, _ in settings], rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title("Accuracy minus that of sft, in points (bold: beyond 2 SE)", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, label="points", fraction=0.03)
    return figure


def _rates(study: Study, store: Store) -> Any:
    """Tuning score by learning rate, each method in its settings."""
    names = [method.name for method in study.methods]
    columns = 5
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(13, 2.4 * lines), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for cell in cells(study):
            if cell.method.name == name:
                curve = analysis.rate_curve(cell, study, store)
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


def _noise(study: Study, store: Store) -> Any:
    """Accuracy by the share of demonstrations with a wrong step."""
    wanted = [name for name in ("clean", "wrong10", "wrong30") if any(s.name == name for s in study.settings)]
    shares = [next(100 * s.share for s in study.settings if s.name == name) for name in wanted]
    by_setting = [
        {row.name: row for row in analysis.rows(next(s for s in study.settings if s.name == name), study, store)}
        for name in wanted
    ]
    figure, grid = plt.subplots(1, len(analysis.MEASURES), figsize=(13, 4), sharey=True)
    colours = plt.get_cmap("tab20")
    for axes, measure in zip(grid, analysis.MEASURES, strict=True):
        for number, method in enumerate(study.methods):
            rows = [rows.get(method.name) for rows in by_setting]
            if all(rows) and rows:
                values = [100 * row.accuracy(measure) for row in rows]
                axes.plot(shares, values, marker="o", label=method.name, color=colours(number))
        if by_setting and BASE in by_setting[0]:
            level = 100 * by_setting[0][BASE].accuracy(measure)
            axes.axhline(level, color="grey", linestyle=":", label="untrained base")
        axes.set_title(measure, fontsize=10)
        axes.set_xlabel("demonstrations with a wrong step, %")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("accuracy, %")
    grid[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def _forgetting(study: Study, store: Store) -> Any:
    """Accuracy on the narrow task against accuracy on all others."""
    figure, axes = plt.subplots(figsize=(6.5, 5))
    for setting in study.settings:
        if not setting.others_weight:
            continue
        for row in analysis.rows(setting, study, store):
            if row.others is not None:
                axes.scatter(100 * row.others, 100 * row.accuracy(AT_BEST), s=18)
                axes.annotate(row.name, (100 * row.others, 100 * row.accuracy(AT_BEST)), fontsize=7)
    axes.set_xlabel("accuracy on the other tasks, %")
    axes.set_ylabel("accuracy on the narrow task, %")
    axes.grid(alpha=0.3)
    return figure


FIGURES = {"differences": _differences, "rates": _rates, "noise": _noise, "forgetting": _forgetting}
