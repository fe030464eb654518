"""`trl-qtarget plot`: methods as curves, or what finished runs have logged of their targets."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..inspection.figures import draw_methods, draw_runs
from .options import read_method


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
    parser.add_argument("--runs", nargs="+", help="instead of methods: folders of runs, or name=folder")
    parser.add_argument("--output", type=Path, default=Path("targets.png"), help="a .png, .svg or .pdf file")
    chosen = parser.parse_args(arguments)
    if chosen.runs:
        draw_runs(dict(_named(text) for text in chosen.runs), chosen.output)
    else:
        configs = [read_method(text) for text in chosen.methods]
        draw_methods(configs, chosen.output, chosen.prior_label_prob)
    sys.stdout.write(f"{chosen.output}\n")
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals else (Path(text).name, Path(text))
