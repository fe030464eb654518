"""`trl-qtarget plot`: methods as curves, or what finished runs have logged of their targets."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..inspection.figures import STATE_NAME, draw_methods, draw_runs
from .options import read_method, refuse


DEFAULT_METHODS = ("sft", "dft", "profit", "label_smoothing", "asft", "target_sft")


def main(arguments: Sequence[str]) -> int:
    """Draw, and say where.

    Raises:
        ValueError: an argument is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="trl-qtarget plot",
        description="Draw methods as functions of the label's probability, or the curves of runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(DEFAULT_METHODS), help="methods, with knobs if wanted: asft:lam=0.03"
    )
    parser.add_argument(
        "--prior_label_prob", type=float, default=0.5, help="the prior's probability of the label in their curves"
    )
    parser.add_argument(
        "--runs", nargs="+", help="instead of methods: folders of runs or their trainer_state.json, or name=folder"
    )
    parser.add_argument("--output", type=Path, default=Path("targets.png"), help="a .png, .svg or .pdf file")
    parser.error = refuse
    chosen = parser.parse_args(arguments)
    if chosen.runs:
        draw_runs(_named(chosen.runs), chosen.output)
    else:
        configs = [read_method(text) for text in chosen.methods]
        draw_methods(configs, chosen.output, chosen.prior_label_prob)
    sys.stdout.write(f"{chosen.output}\n")
    return 0


def _named(texts: Sequence[str]) -> dict[str, Path]:
    """Runs by name: the one given, or else the end of their path.

    Raises:
        ValueError: two runs have one name.
    """
    runs: list[tuple[str | None, Path]] = []
    for text in texts:
        name, equals, folder = text.partition("=")
        runs.append((name, Path(folder)) if equals and not Path(text).exists() else (None, Path(text)))
    nameless = [_folders(path) for name, path in runs if name is None]
    named = {}
    for name, path in runs:
        name = _own_end(_folders(path), nameless) if name is None else name
        if name in named:
            raise ValueError(f"`runs` has `{name}` twice: give each run a name of its own, as in name=folder.")
        named[name] = path
    return named


def _folders(path: Path) -> tuple[str, ...]:
    """The folders that lead to a run, and the run's."""
    whole = Path(os.path.abspath(path))
    return (whole.parent if whole.name == STATE_NAME else whole).parts


def _own_end(path: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """As much of the end of a path as only one of all of them has."""
    for length in range(1, len(path)):
        if sum(other[-length:] == path[-length:] for other in others) == 1:
            return "/".join(path[-length:])
    return str(Path(*path))
