"""A sitting at a GPU: everything that waits for one, the most important first, in the time that there is.

Each part is a process with its own limit. Results are written as they come; a second call goes on with what is not
done. `$OUT` is the default folder of results where it is set; all are kept in `outputs/gpu` too.

    python -m benchmarks.gpu                          # all of it: 25 minutes at most
    python -m benchmarks.gpu --minutes 9              # what fits, then the same again
    python -m benchmarks.gpu --parts head-trl pieces
    python -m benchmarks.gpu --toy                    # a rehearsal: toy sizes, Triton's interpreter without a GPU
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trl_qtarget.files import replacing

from ..process import DONE, FAILED, ROOT, run_limited
from . import install
from .parts import BY_NAME, PARTS, Part


STATE, LOG, REPORT = "state.json", "log.txt", "report.md"
# What a part's start, and the end of its last measurement, may take of its time.
_START, _LAST = 10, 0.1
# With less than this, in seconds, no part is begun.
_LEAST = 15
# Before what a part prints, in the log.
_HEADLINE = "===== "


class Sitting:
    """The folder of results: which part has ended how, its log, and a report of all; each file is whole or old."""

    def __init__(self, folder: Path, kept: Path):
        self.folder, self.kept = folder.resolve(), kept.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.kept.is_dir() and self.kept != self.folder:
            for path in self.kept.iterdir():  # of an earlier sitting
                if path.is_file() and not (self.folder / path.name).exists():
                    shutil.copy2(path, self.folder)
        path = self.folder / STATE
        self.state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"facts": "", "parts": {}}

    @property
    def log(self) -> Path:
        """What the parts have printed."""
        return self.folder / LOG

    def ended(self, part: Part, how: str, seconds: float) -> None:
        """Note how a part has ended, with the last lines that it has printed if that is not well."""
        tail = []
        if how != DONE and not how.startswith("left out") and self.log.is_file():
            *_, printed = self.log.read_text(errors="replace").rpartition(f"{_HEADLINE}{part.name}:")
            tail = printed.splitlines()[1:][-12:]
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.state["parts"][part.name] = {"how": how, "seconds": round(seconds), "date": date, "tail": tail}
        self.write()

    def write(self) -> None:
        """State and report; and all files to where they are kept."""
        self._put(STATE, json.dumps(self.state, indent=1))
        self._put(REPORT, self._report())
        if self.kept != self.folder:
            self.kept.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path.is_file():
                    with replacing(self.kept / path.name) as unfinished:
                        shutil.copy2(path, unfinished)

    def _put(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def _report(self) -> str:
        lines = ["# A sitting at a GPU", "", self.state["facts"], "", "## Parts", ""]
        for part in PARTS:
            ended = self.state["parts"].get(part.name)
            how = f"{ended['how']}, {ended['seconds']} s" if ended else "not run"
            lines.append(f"- **{part.name}**: {how} ({part.about})")
            lines += [f"      {line}" for line in (ended or {}).get("tail", ())]
        for path in sorted(self.folder.glob("*.csv")):
            lines += ["", f"## {path.name}", "", *_short(path)]
        return "\n".join(lines) + "\n"


def _short(path: Path) -> list[str]:
    """The rows of a file of results in a few columns."""
    names = ("provider", "mode", "N", "H", "V", "dtype", "median", "floor_ratio", "trl_ratio", "machine")
    with path.open(newline="") as file:
        rows = [[row[name] for name in names] for row in csv.DictReader(file)]
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


_PARTS_HELP = f"of {', '.join(BY_NAME)}; None: all that are not done"


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=list(BY_NAME), metavar="PART", help=_PARTS_HELP)
    parser.add_argument("--minutes", type=float, default=25, help="for this call, from its start on")
    parser.add_argument("--toy", action="store_true", help="a rehearsal at toy sizes")
    parser.add_argument("--output_dir", type=Path, help="for results; None: $OUT, else the folder that keeps them")
    parser.add_argument("--keep", type=Path, help="results of earlier calls, too; None: outputs/gpu, of --toy gpu-toy")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes

    # Apart, so that a rehearsal counts for nothing.
    keep = arguments.keep or ROOT / "outputs" / ("gpu-toy" if arguments.toy else "gpu")
    sitting = Sitting(arguments.output_dir or Path(os.environ.get("OUT") or keep), keep)
    said = install.install()
    found = install.facts()
    device = "cuda" if found.get("gpu") else "cpu"
    sitting.state["facts"] = install.report(found, said)
    sitting.write()
    print(sitting.state["facts"], flush=True)
    if device == "cpu" and not arguments.toy:
        print("There is no GPU here: `--toy` rehearses without one.")
        return 1

    failed = []
    for part in _order(sitting, arguments.parts):
        left = end - time.monotonic()
        seconds = min(part.seconds, left)
        if left < _LEAST:
            print(f"{part.name} is left to another call: no time is left.", flush=True)
            continue
        reason = part.lacks()
        print(f"{part.name}: {f'left out, {reason}' if reason else f'at most {seconds:.0f} s'}", flush=True)
        begun = time.monotonic()
        how = f"left out: {reason}" if reason else _run(part, seconds, device, arguments.toy, sitting)
        sitting.ended(part, how, time.monotonic() - begun)
        print(f"{part.name}: {how}, {time.monotonic() - begun:.0f} s", flush=True)
        if how == FAILED:
            failed.append(part.name)
            print("\n".join(sitting.state["parts"][part.name]["tail"]), flush=True)
    print(f"Results are in {sitting.folder}.")
    return 1 if failed else 0


def _order(sitting: Sitting, wanted: list[str] | None) -> list[Part]:
    """Parts that are asked for; else those that have not run, then those that ran and are not done."""
    if wanted is not None:
        return [BY_NAME[name] for name in wanted]
    ended = sitting.state["parts"]
    fresh = [part for part in PARTS if part.name not in ended]
    return fresh + [part for part in PARTS if part.name in ended and ended[part.name]["how"] != DONE]


def _environment(part: Part, device: str, toy: bool) -> dict[str, str]:
    given = install.environment()
    for name, value in part.environment.items():
        prefix, _, bare = name.rpartition(":")
        if prefix == ("toy" if toy else ""):
            given[bare] = value
    if device == "cpu":
        given |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        given.pop("TRITON_INTERPRET", None)
    return given


def _run(part: Part, seconds: float, device: str, toy: bool, sitting: Sitting) -> str:
    """Run a part and say how it ended. When its time is over it is stopped, with all its processes."""
    budget = max(1.0, (1 - _LAST) * seconds - _START)
    command = part.arguments(toy, device, str(sitting.folder), budget)
    with sitting.log.open("a") as log:
        log.write(f"\n{_HEADLINE}{part.name}: {' '.join(command[1:])}\n")
        log.flush()
        environment = _environment(part, device, toy)
        return run_limited(command, seconds, env=environment, stdout=log, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it ends its processes first
    sys.exit(main())
