"""Measure everything, draw the figures, and write the README's section on speed and memory.

Every part is a process of its own with a share of the time (8 minutes on a GPU, 60 on a CPU); what one leaves is
given to those after it. A part writes its rows as it goes: what was measured is kept, however a run ends, and
`--only` runs again what is missing.

    python -m benchmarks
    python -m benchmarks --only head sweep
    python -m benchmarks --quick      # toy sizes, to see that all of it runs; into outputs/benchmarks
"""

import argparse
import importlib.util
import signal
import sys
import time
from pathlib import Path

import torch

from . import figures, readme
from .common import RESULTS
from .parts import PARTS
from .process import FAILED, ROOT, run_limited


MINUTES = {"cuda": 8, "cpu": 60}
# Of a part's time, what its start and its last measurement may take beyond its own budget: in seconds, and as a share.
_START, _LAST = 15, 0.1
# Seconds for figures and text.
_REPORT = 20


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="toy sizes, whose rows are kept apart")
    parser.add_argument("--device", choices=list(MINUTES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="for all of it; None: 8 on CUDA, 60 elsewhere")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for rows, figures and text; None: benchmarks/results, docs/figures and the README",
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.output is None:
        arguments.output = ROOT / "outputs" / "benchmarks"
    results = arguments.output or RESULTS
    end = time.monotonic() + 60 * (arguments.minutes or MINUTES[arguments.device]) - _REPORT

    failed = []
    for number, name in enumerate(arguments.only):
        ahead = sum(PARTS[each].share for each in arguments.only[number:])
        seconds = (end - time.monotonic()) * PARTS[name].share / ahead
        print(f"[{number + 1}/{len(arguments.only)}] {name}: at most {seconds:.0f} s", flush=True)
        begun = time.monotonic()
        outcome = _run(name, seconds, results / f"{name}-{arguments.device}.csv", arguments)
        print(f"[{number + 1}/{len(arguments.only)}] {name}: {outcome}, {time.monotonic() - begun:.0f} s", flush=True)
        if outcome == FAILED:
            failed.append(name)

    _report(results, arguments.output)
    if failed:
        print(f"failed: {', '.join(failed)}; run them again with --only {' '.join(failed)}.", flush=True)
    return 1 if failed else 0


def _run(name: str, seconds: float, output: Path, arguments: argparse.Namespace) -> str:
    """Run one part and say how it ended. When its time is over it is stopped, with all its processes."""
    budget = (1 - _LAST) * seconds - _START
    if budget <= 0:
        return "left out, no time is left"
    command = [sys.executable, "-m", f"benchmarks.{PARTS[name].module}"]
    command += PARTS[name].arguments(arguments.device, arguments.quick)
    command += ["--device", arguments.device, "--budget", f"{budget:.0f}", "--output", str(output.resolve())]
    return run_limited(command, seconds)


def _report(results: Path, output: Path | None) -> None:
    """Figures and text, from the rows on disk."""
    if importlib.util.find_spec("matplotlib") is None:
        print("The figures are left out: matplotlib is not installed.")
    else:
        for path in figures.draw(results, output / "figures" if output else figures.FIGURES):
            print(f"drawn: {path}")
    if output is None:
        readme.main([])
    else:
        text = output / "performance.md"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(readme.section(results) + "\n", encoding="utf-8")
        print(f"The text for the README is in {text}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it ends its processes first
    sys.exit(main())
