"""Time of one loss call, forward and backward, from hidden states and LM head to their gradients.

Ours, TRL's and dense PyTorch run in the same rounds as the bare matrix products (the floor), with the head trainable
and frozen. Before anything is timed, providers of one objective are checked to agree in loss and gradients.

    python -m benchmarks.head
    python -m benchmarks.head --providers qtarget trl/dft --shapes 256x64x1000 --repeats 3 --output /tmp/head.csv
"""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .budget import Budget
from .common import (
    DTYPES,
    base_parser,
    finish_arguments,
    interleave,
    progress_bar,
    ratio,
    select,
    summary,
    write_results,
)
from .inputs import Inputs, Shape, make_inputs
from .providers import PROVIDERS, available, check_agreement, fits, floor


# SmolLM2-135M's head, and one as wide as those of the smallest models with Qwen's vocabulary.
SHAPES = ("1024x576x49152", "512x1024x151936")
# An 8B model's head, which only a GPU scores in reasonable time.
CUDA_SHAPES = ("8192x4096x151936",)

MODES = ("trainable", "frozen")
Row = dict[str, Any]
_FLOORS = {"floor/own": False, "floor/reference": True}


def _floor_of(name: str) -> str:
    return "floor/reference" if PROVIDERS[name].reference else "floor/own"


def _calls(names: list[str], inputs: Inputs) -> dict[str, Callable[[], Any]]:
    needed = {_floor_of(name) for name in names}
    floors = {name: floor(inputs, reference) for name, reference in _FLOORS.items() if name in needed}
    return floors | {name: partial(PROVIDERS[name], inputs) for name in names}


def timed_rows(names: list[str], inputs: Inputs, arguments: Namespace, progress: tqdm, limit: float) -> list[Row]:
    """Rows of a result file, without benchmark and mode: seconds of some providers and of their floors."""
    times = interleave(_calls(names, inputs), arguments.warmup, arguments.repeats, arguments.device, progress, limit)
    rows = []
    for name, values in times.items():
        ratios = {}
        if name in PROVIDERS:
            ratios["floor_ratio"] = ratio(values, times.get(_floor_of(name)))
            ratios["trl_ratio"] = ratio(values, times.get(PROVIDERS[name].counterpart))
        rows.append({**vars(inputs.shape), "metric": "seconds", "provider": name, **summary(values), **ratios})
    return rows


def calls_of(names: list[str], arguments: Namespace) -> int:
    """Calls that `timed_rows` makes at most."""
    return (arguments.warmup + arguments.repeats) * (len(names) + len({_floor_of(name) for name in names}))


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=7)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="NxHxV; None: the shapes of the README")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the first one that counts")
    arguments = finish_arguments(parser.parse_args(argv), "head")
    known = available(select(PROVIDERS, arguments.providers), arguments.providers, arguments.device)
    default_shapes = SHAPES + (CUDA_SHAPES if arguments.device == "cuda" else ())
    shapes = arguments.shapes or [Shape.parse(text) for text in default_shapes]

    groups = len(shapes) * len(arguments.modes)
    budget = Budget(arguments.budget, groups)
    with progress_bar(groups * calls_of(known, arguments), "call") as progress:
        for shape in shapes:
            names = [name for name in known if fits(name, shape, arguments.device)]
            if len(names) < len(known):
                print(f"\nnot enough memory at {shape} for {', '.join(sorted(set(known) - set(names)))}.")
            inputs = None
            for mode in arguments.modes:
                limit = budget.share(f"{shape} {mode}")
                if limit == 0:
                    continue
                end = time.perf_counter() + limit
                progress.set_description(f"{shape} {mode}")
                try:
                    inputs = inputs or make_inputs(shape, DTYPES[arguments.dtype], arguments.device)
                    given = inputs if mode == "trainable" else inputs.frozen()
                    able = check_agreement(names, given)
                    rows = timed_rows(able, given, arguments, progress, end - time.perf_counter())
                except torch.OutOfMemoryError:
                    print(f"\n{shape} {mode} is left out: not enough memory.", flush=True)
                    continue
                fixed = {"benchmark": "head", "mode": mode, "dtype": arguments.dtype}
                # After each group: what an interrupted run has measured is kept.
                write_results(arguments.output, [fixed | row for row in rows], arguments.device)
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
