"""Figures for papers and documentation: methods as curves, and the curves of finished runs."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from ..target.config import QTargetConfig
from .curves import method_curves


logger = logging.getLogger(__name__)

# What is drawn of a run, with the words of its axis.
RUN_METRICS = {
    "target/nll": "NLL of the labels, nats",
    "target/trust": "trust γ",
    "target/label_mass": "target's mass on the label",
    "target/kl": "KL(Q‖p), nats",
    "target/prior_agreement": "labels that are the prior's favourite",
}
STATE_NAME = "trainer_state.json"


def pyplot_to_files() -> Any:
    """Matplotlib's pyplot, without a screen, so that equal figures are equal files.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError(
            "a figure needs the package `matplotlib`, which is not installed: `pip install 'trl-qtarget[plot]'`."
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "trl-qtarget"
    from matplotlib import pyplot

    return pyplot


def draw_methods(configs: Sequence[QTargetConfig], path: Path, prior_label_prob: float = 0.5) -> None:
    """Target and gradient of methods along the label's probability, into a .png, .svg or .pdf file."""
    pyplot, curves = pyplot_to_files(), method_curves(configs, prior_label_prob)
    figure, (masses, gradients) = pyplot.subplots(1, 2, figsize=(10, 4))
    colours = pyplot.get_cmap("tab10" if len(curves) <= 10 else "tab20")
    for number, curve in enumerate(curves):
        style = {"label": curve.name, "color": colours(number), "linestyle": ("-", "--", "-.")[number // 7 % 3]}
        masses.plot(curve.label_probs, curve.label_mass, **style)
        gradients.plot(curve.label_probs, curve.gradient, **style)
    masses.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="the policy itself")
    gradients.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    masses.set_ylabel("target's mass on the label, Q(y)")
    gradients.set_ylabel("gradient on the label's logit, s (p(y) − Q(y))")
    for axes in (masses, gradients):
        axes.set_xlabel("policy's probability of the label, p(y)")
        axes.grid(alpha=0.3)
    # One legend for both, which are drawn alike but for the policy itself.
    gradients.legend(*masses.get_legend_handles_labels(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    pyplot.close(figure)


def read_run(path: Path) -> list[dict[str, float]]:
    """The log lines of a finished or interrupted run: a `trainer_state.json`, or the newest one in a folder.

    Raises:
        ValueError: there is none, none is whole, or it has no metrics of a target.
    """
    file = path
    if path.is_dir():
        file, state = _newest_state(path)
    elif path.is_file():
        state = _read_state(path)
    else:
        raise ValueError(f"`{path}` does not exist: name the folder of a run, or its {STATE_NAME}.")
    lines = [line for line in state["log_history"] if "target/nll" in line]
    if not lines:
        raise ValueError(f"`{file}` has no `target/` metrics: was it trained with `QTargetSFTTrainer`?")
    return lines


def _newest_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The state of the last step in the folder of a run; what an interruption has left half-written is passed over."""
    found = [file for file in (folder / STATE_NAME, *folder.glob(f"checkpoint-*/{STATE_NAME}")) if file.is_file()]
    if not found:
        raise ValueError(f"`{folder}` has no {STATE_NAME}, nor has a checkpoint in it: name the folder of a run.")
    states, broken = {}, []
    for file in found:
        try:
            states[file] = _read_state(file)
        except ValueError as error:
            broken.append(error)
    if not states:
        raise broken[0]
    for error in broken:
        logger.warning(f"{error} It is passed over.")
    return max(states.items(), key=lambda item: item[1]["global_step"])


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if {"global_step", "log_history"} <= state.keys():
            return state
    except (ValueError, AttributeError):  # no JSON, or no object
        pass
    raise ValueError(f"`{file}` is not a whole {STATE_NAME}: was the run interrupted while it was written?")


def draw_runs(runs: dict[str, Path], path: Path) -> None:
    """What was logged of the targets of some runs, overlaid, into a .png, .svg or .pdf file."""
    histories = {name: read_run(run) for name, run in runs.items()}
    pyplot = pyplot_to_files()
    figure, grid = pyplot.subplots(2, 3, figsize=(13, 6.5), sharex=True)
    *panels, corner = grid.flat
    for axes, (metric, words) in zip(panels, RUN_METRICS.items(), strict=True):
        for name, lines in histories.items():
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=name)
        axes.set_ylabel(words)
        axes.grid(alpha=0.3)
        axes.set_xlabel("optimiser step")
    corner.axis("off")
    corner.legend(*panels[0].get_legend_handles_labels(), loc="upper left")
    figure.tight_layout()
    save(figure, path)
    pyplot.close(figure)


def check_path(path: Path) -> None:
    """Raise a ValueError unless a figure can be drawn into a file of this name."""
    pyplot_to_files()
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"`{path.name}` must end in .png, .svg or .pdf.")


def save(figure: Any, path: Path) -> None:
    """Write a figure as a whole file, the same for the same figure.

    Raises:
        ValueError: the file's ending is none of .png, .svg and .pdf.
    """
    check_path(path)
    with replacing(path) as whole:
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix[1:])
        figure.savefig(whole, format=path.suffix[1:], dpi=150, bbox_inches="tight", metadata=metadata)
