"""Figures of the results, made from the rows of the result files alone.

python -m benchmarks.figures
python -m benchmarks.figures --results FOLDER --output FOLDER
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_qtarget.files import replacing
from trl_qtarget.inspection.figures import pyplot_to_files

from .common import RESULTS
from .selection import BENCHMARKS, Row, newest


FIGURES = Path(__file__).parents[1] / "docs" / "figures"
_COLOURS = {
    "qtarget": "tab:blue",
    "qtarget-torch": "tab:cyan",
    "trl": "tab:orange",
    "liger": "tab:green",
    "cce": "tab:purple",
    "cce-exact": "tab:pink",
    "compile": "tab:brown",
    "dense": "tab:grey",
}
# Methods whose bars stand side by side.
_OBJECTIVES = {
    "1": ("sft", "nll"),
    "2": ("dft",),
    "3": ("target_sft", "target_sft+reference"),
    "4": ("forward_kl", "distillation"),
}
_LINES = {"trainable": "-", "frozen": "--"}
_SIZES = {"N": "tokens N", "V": "vocabulary V", "H": "hidden width H"}


def _pyplot() -> Any:
    try:
        return pyplot_to_files()
    except ValueError:
        raise SystemExit('The figures need matplotlib: pip install -e ".[plot]".') from None


def draw(results: Path, output: Path) -> list[Path]:
    """Draw what there are rows for, as `benchmark-<what>-<device>.svg`; return the files."""
    drawn = []
    for device in ("cpu", "cuda"):
        for name, rows in newest(results, device).items():
            if name in _FIGURES:
                path = output / f"benchmark-{name}-{device}.svg"
                figure = _FIGURES[name](_pyplot(), rows)
                figure.suptitle(_machine(rows[0]), fontsize=9)
                _save(figure, path)
                _pyplot().close(figure)
                drawn.append(path)
    return drawn


def _machine(row: Row) -> str:
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    return f"{row['machine']}{threads}; torch {row['torch']}, trl {row['trl']}"


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as whole:
        figure.savefig(whole, format="svg", bbox_inches="tight", metadata={"Date": None})


# --- bars ---


def _shape(row: Row) -> str:
    return f"N={row['N']}, H={row['H']}, V={row['V']}, {row['dtype']}"


def _by(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by a key, in the order in which the keys first come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _objective_and_package(provider: str) -> tuple[str, int]:
    """Sorts implementations of one objective together."""
    package, _, method = provider.partition("/")
    objective = [known for known, methods in _OBJECTIVES.items() if method in methods]
    order = list(_COLOURS)
    return (*objective, method)[0], order.index(package) if package in order else len(order)


def _bars(pyplot: Any, panels: dict[str, list[Row]], value: Callable[[Row], float], words: str) -> Any:
    """A panel of horizontal bars for each group: one bar per provider and mode, coloured by package."""
    heights = [1 + 0.2 * len(rows) for rows in panels.values()]
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=(8, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=True):
        modes = list(dict.fromkeys(row["mode"] for row in rows))
        rows = sorted(rows, key=lambda row: (_objective_and_package(row["provider"]), modes.index(row["mode"])))
        values = [value(row) for row in rows]
        colours = [_COLOURS.get(row["provider"].split("/")[0], "black") for row in rows]
        bars = axes.barh(range(len(rows)), values, color=colours)
        for bar, row in zip(bars, rows, strict=True):
            bar.set_alpha(1 if row["mode"] == modes[0] else 0.55)
        axes.bar_label(
            bars, [f"{each:.2f}" if each >= 0.1 else f"{each:.2g}" for each in values], fontsize=7, padding=2
        )
        axes.set_yticks(range(len(rows)), [f"{row['provider']}, {row['mode']}" for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(words, fontsize=8)
        axes.grid(alpha=0.3, axis="x")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    return figure


def _head(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Time of one loss call as a multiple of the bare matrix products of the same rounds."""
    rows = [row for row in rows if row["floor_ratio"]]
    figure = _bars(
        pyplot, _by(rows, _shape), lambda row: float(row["floor_ratio"]), "time ÷ bare matrix products (the floor)"
    )
    for axes in figure.axes:
        axes.axvline(1, color="black", linewidth=0.8)
    return figure


def _memory(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Gigabytes of one loss call beyond inputs and returned gradients."""
    beyond = _beyond_returned(rows)
    measured = [row for row in rows if row["provider"] != "floor/returned"]
    words = "peak memory beyond inputs and returned gradients, GB"
    return _bars(pyplot, _by(measured, _shape), beyond, words)


def _step(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Seconds of a whole training step."""
    return _bars(pyplot, _by(rows, _shape), lambda row: float(row["median"]), "time of a training step, s")


def _beyond_returned(rows: Sequence[Row]) -> Callable[[Row], float]:
    """Gigabytes of a row without the gradients that every implementation returns."""

    def place(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in ("benchmark", "mode", "N", "H", "V", "dtype"))

    returned = {place(row): float(row["median"]) for row in rows if row["provider"] == "floor/returned"}
    return lambda row: (float(row["median"]) - returned[place(row)]) / 1e9


# --- lines ---


def _sweep(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Above, microseconds per token against N, V and H; below, memory."""
    figure, grid = pyplot.subplots(2, 3, figsize=(11, 6.5))
    beyond = _beyond_returned([row for row in rows if row["metric"] == "bytes"])

    def per_token(row: Row) -> float:
        return 1e6 * float(row["median"]) / int(row["N"])

    quantities = (
        ("seconds", per_token, "time per token, µs"),
        ("bytes", beyond, "memory beyond returned gradients, GB"),
    )
    for line, (metric, value, words) in zip(grid, quantities, strict=True):
        for axes, (size, name) in zip(line, _SIZES.items(), strict=True):
            points = [row for row in rows if row["benchmark"] == f"sweep {size}" and row["metric"] == metric]
            points = [row for row in points if not row["provider"].startswith("floor/")]
            for curve in _by(points, lambda row: f"{row['provider']}, {row['mode']}").values():
                curve = sorted(curve, key=lambda row: int(row[size]))
                style = {"linestyle": _LINES[curve[0]["mode"]], "label": f"{curve[0]['provider']}, {curve[0]['mode']}"}
                style["color"] = _curve_colour(curve[0]["provider"])
                axes.plot([int(row[size]) for row in curve], [value(row) for row in curve], marker=".", **style)
            if points:
                fixed = ", ".join(f"{other}={points[0][other]}" for other in _SIZES if other != size)
                axes.set_title(f"{fixed}, {points[0]['dtype']}", fontsize=8)
            axes.set_xlabel(name, fontsize=8)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
        line[0].set_ylabel(words, fontsize=8)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, fontsize=7, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.02))
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    return figure


def _curve_colour(provider: str) -> str:
    """A colour for each package, darker where a reference model is read."""
    reference = provider.endswith(("target_sft", "forward_kl"))
    colours = {"qtarget": ("tab:blue", "navy"), "trl": ("tab:orange", "tab:red")}
    package = provider.split("/")[0]
    return colours[package][reference] if package in colours else _COLOURS.get(package, "black")


_FIGURES = {"head": _head, "memory": _memory, "sweep": _sweep, "step": _step}


def main(argv: list[str] | None = None) -> None:
    """Draw the figures of a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help=f"folder with {'-*.csv, '.join(BENCHMARKS)}-*.csv"
    )
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the figures")
    arguments = parser.parse_args(argv)
    for path in draw(arguments.results, arguments.output):
        print(path)


if __name__ == "__main__":
    main()
