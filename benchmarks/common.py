"""What the benchmarks share: interleaved timing, facts about the machine, and result files."""

import argparse
import csv
import datetime
import gc
import importlib.metadata
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import trl_qtarget
from trl_qtarget.files import replacing

from .budget import rounds


COLUMNS = (
    *("benchmark", "provider", "mode", "N", "H", "V", "dtype"),
    *("metric", "median", "min", "max", "repeats", "floor_ratio", "trl_ratio"),
    *("device", "machine", "threads", "torch", "trl", "transformers", "trl_qtarget", "date"),
)
# Rows that agree in all of these measure the same thing: a new one replaces the old one.
_IDENTITY = ("benchmark", "provider", "mode", "N", "H", "V", "dtype", "metric", "device", "machine", "threads")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"


# --- command line ---


def base_parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    summary = (description or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="None: bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each provider")
    parser.add_argument("--threads", type=int, help="CPU threads; None leaves torch's choice")
    parser.add_argument("--providers", nargs="+", help="names such as qtarget/dft, or groups such as qtarget")
    parser.add_argument("--budget", type=float, help="seconds after which nothing more is begun; None: no limit")
    parser.add_argument("--output", type=Path, help="CSV file; None: benchmarks/results/<benchmark>-<device>.csv")
    return parser


def finish_arguments(arguments: argparse.Namespace, benchmark: str) -> argparse.Namespace:
    """Fill in what depends on the device, and warn where the machine is too busy for good numbers."""
    if arguments.repeats < 1:
        raise SystemExit("--repeats must be at least 1.")
    arguments.dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    arguments.output = arguments.output or RESULTS / f"{benchmark}-{arguments.device}.csv"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"note: the load average is {os.getloadavg()[0]:.1f}; timings need a quiet machine.", file=sys.stderr)
    return arguments


def select(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """The names asked for, by full name or by the group before the slash."""
    names = list(names)
    if wanted is None:
        return names
    for name in wanted:
        if not any(name in (known, known.split("/")[0]) for known in names):
            raise SystemExit(f"unknown provider {name!r}: choose among {', '.join(names)}.")
    return [name for name in names if name in wanted or name.split("/")[0] in wanted]


# --- measuring ---


def progress_bar(total: int, unit: str) -> tqdm:
    """A progress bar on stderr, terse enough for a log."""
    return tqdm(total=total, unit=unit, mininterval=1.0, dynamic_ncols=True)


def synchronize(device: str) -> None:
    """Wait for the device, which on CUDA runs behind Python."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall-clock time of one call. Letting go of what it returns is not timed."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    warmup: int,
    repeats: int,
    device: str,
    progress: tqdm,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Time every call once per round, so that a slow spell of the machine hits all alike.

    At least one round counts; there are fewer than `repeats` where they would take longer than `limit` seconds. The
    order changes from round to round: what a call leaves in the caches is not always found by the same other.
    """
    rng = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()  # what the imports left need not be searched before every call
    try:
        for number in rounds(warmup + 1, warmup + repeats, limit):
            for name in rng.sample(list(calls), len(calls)):
                progress.set_postfix_str(name, refresh=False)
                elapsed = seconds(calls[name], device)
                if number >= warmup:
                    times[name].append(elapsed)
                progress.update()
    finally:
        gc.unfreeze()
    return times


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The columns `median`, `min`, `max` and `repeats`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def ratio(values: Sequence[float], others: Sequence[float] | None) -> float | None:
    """Median over the rounds of value/other: both saw the same spell of the machine."""
    if not others:
        return None
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


# --- results ---


def machine_facts(device: str) -> dict[str, Any]:
    """What a number depends on, without anything that tells whose machine it was."""
    # Ours by the code itself, which runs from a checkout too.
    versions = {name: importlib.metadata.version(name) for name in ("torch", "trl", "transformers")}
    versions["trl_qtarget"] = trl_qtarget.__version__
    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "threads": torch.get_num_threads(),
        **versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_results(path: Path) -> list[dict[str, str]]:
    """Rows of a result file; none if there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_results(path: Path, rows: Iterable[Mapping[str, Any]], device: str) -> None:
    """Add rows to a result file; a row that measures the same as an old one takes its place."""
    facts = machine_facts(device)
    texts = [{name: _text((facts | dict(row)).get(name)) for name in COLUMNS} for row in rows]
    merged = {tuple(row.get(name, "") for name in _IDENTITY): row for row in [*read_results(path), *texts]}
    # A reader, or an interrupted run, never meets half a file.
    with replacing(path) as whole, whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(merged.values())


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
