"""Peak memory of one loss call, forward and backward, beyond its inputs.

On a CPU each provider runs in a process of its own. What counts is the highest memory in use during the call minus the
memory in use just before it, when hidden states, heads, labels and the libraries' own start-up memory are already
there. So everything the call itself needs counts: logits, buffers, temporary copies, and also the gradients that it
returns (N·H, and V·H with a trainable head). These returned gradients are the floor: no implementation can do with
less.

On a CPU this is resident memory: the kernel's high-water mark (`VmHWM`), reset before the call; where it cannot be
reset, the largest of samples taken every 2 ms. On CUDA it is what PyTorch's allocator handed out.

    python -m benchmarks.memory
    python -m benchmarks.memory --providers qtarget trl --shapes 512x64x32000 --repeats 1 --output /tmp/memory.csv
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from .budget import Budget
from .common import (
    DTYPES,
    base_parser,
    finish_arguments,
    progress_bar,
    ratio,
    select,
    summary,
    synchronize,
    write_results,
)
from .inputs import Inputs, Shape, make_inputs
from .providers import PROVIDERS, available, fits, pointed_out


# A large vocabulary on a narrow model: most of the memory is the loss's own, and a CPU finishes in reasonable time.
SHAPES = ("4096x256x151936",)

# Every provider once at this size before the measured call, so that thread pools and workspaces exist by then.
_WARMUP_SHAPE = Shape(8, 16, 64)
# `bytes`, and their `source`.
Peak = dict[str, Any]


# --- the process that measures ---


def _status(field: str) -> int:
    """A memory field of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def _reset_high_water_mark() -> bool:
    with suppress(OSError, AttributeError):
        Path("/proc/self/clear_refs").write_text("5")
        # Some sandboxes accept the write and ignore it: then the mark stays far above what is resident now.
        return _status("VmHWM") - _status("VmRSS") < 1 << 23
    return False


def _sampled_peak(call: Callable[[], Any]) -> int:
    """Bytes above the start, from samples: a lower bound that misses peaks shorter than the interval."""
    process, done = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        result = call()
        peak = max(peak, process.memory_info().rss)
        del result
    finally:
        done.set()
        thread.join()
    return peak - start


def _cpu_peak(call: Callable[[], Any]) -> tuple[int, str]:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would be handed out again, uncounted
    if not _reset_high_water_mark():
        return _sampled_peak(call), "samples"
    start = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - start, "VmHWM"


def _cuda_peak(call: Callable[[], Any]) -> tuple[int, str]:
    synchronize("cuda")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    result = call()
    synchronize("cuda")
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - start, "allocator"


def measure(name: str, shape: Shape, mode: str, dtype: torch.dtype, device: str) -> Peak:
    """Peak bytes of one provider in this process, and how they were found."""

    def inputs(size: Shape) -> Inputs:
        made = make_inputs(size, dtype, device)
        return made if mode == "trainable" else made.frozen()

    PROVIDERS[name](inputs(_WARMUP_SHAPE))
    given = inputs(shape)
    gc.collect()
    peak = _cuda_peak if device == "cuda" else _cpu_peak
    size, source = peak(lambda: PROVIDERS[name](given))
    return {"bytes": size, "source": source}


# --- the process that starts them ---


def _measure_apart(name: str, shapes: Sequence[Shape], mode: str, dtype: str, arguments: Namespace) -> list[Peak]:
    """`measure` at each shape, in one fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", "--providers", name]
    command += ["--shapes", *map(str, shapes), "--modes", mode, "--dtype", dtype, "--device", arguments.device]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    # glibc: give every large block back when it is freed, so that none is handed out again uncounted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} at {shapes} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()[-len(shapes) :]]


def peaks(name: str, shapes: Sequence[Shape], mode: str, dtype: str, arguments: Namespace) -> dict[Shape, Peak]:
    """`measure` at the shapes where a provider can run; those where it cannot are pointed out."""
    found = {}
    shapes = [shape for shape in shapes if fits(name, shape, arguments.device)]
    if arguments.device != "cuda":
        if shapes:
            with pointed_out(name, ", ".join(map(str, shapes))):
                found.update(zip(shapes, _measure_apart(name, shapes, mode, dtype, arguments), strict=True))
        return found
    # PyTorch's allocator counts exactly, whatever ran before; resident memory needs a process of its own.
    for shape in shapes:
        torch.cuda.empty_cache()
        with pointed_out(name, shape):
            found[shape] = measure(name, shape, mode, DTYPES[dtype], arguments.device)
    return found


def _returned_gradients(shape: Shape, mode: str, dtype: torch.dtype) -> int:
    rows = shape.N + (shape.V if mode == "trainable" else 0)
    return rows * shape.H * dtype.itemsize


def memory_rows(sizes: dict[str, list[int]], shape: Shape, mode: str, dtype: str) -> list[dict[str, Any]]:
    """Rows of a result file, without the benchmark's name: bytes of some providers and of the returned gradients."""
    fixed = {"mode": mode, **vars(shape), "dtype": dtype, "metric": "bytes"}
    returned = _returned_gradients(shape, mode, DTYPES[dtype])
    rows = []
    for name, values in sizes.items():
        counterpart = sizes.get(PROVIDERS[name].counterpart)
        ratios = {"floor_ratio": ratio(values, [returned] * len(values)), "trl_ratio": ratio(values, counterpart)}
        rows.append({**fixed, "provider": name, **summary(values), **ratios})
    rows.append({**fixed, "provider": "floor/returned", **summary([returned])})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=3)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in SHAPES])
    parser.add_argument("--modes", nargs="+", choices=["trainable", "frozen"], default=["trainable"])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = finish_arguments(parser.parse_args(argv), "memory")
    names = available(select(PROVIDERS, arguments.providers), arguments.providers, arguments.device)
    if arguments.measure:
        for shape in arguments.shapes:
            peak = measure(names[0], shape, arguments.modes[0], DTYPES[arguments.dtype], arguments.device)
            print(json.dumps(peak), flush=True)
        return

    budget = Budget(arguments.budget)
    with progress_bar(len(arguments.shapes) * len(arguments.modes) * len(names), "provider") as progress:
        for shape in arguments.shapes:
            for mode in arguments.modes:
                progress.set_description(f"{shape} {mode}")
                sizes: dict[str, list[int]] = {}
                for name in names:
                    progress.set_postfix_str(name)
                    if not fits(name, shape, arguments.device):
                        print(f"\nskipped {name}: not enough free memory for full logits.", file=sys.stderr)
                    elif budget.begins(f"{name} at {shape} {mode}"):
                        sizes |= _repeated(name, shape, mode, arguments)
                        # After each: what an interrupted run has measured is kept. All again, with ratios to the last.
                        rows = memory_rows(sizes, shape, mode, arguments.dtype)
                        rows = [{"benchmark": "memory"} | row for row in rows]
                        write_results(arguments.output, rows, arguments.device)
                    progress.update()
    print(f"Results are in {arguments.output}.")


def _repeated(name: str, shape: Shape, mode: str, arguments: Namespace) -> dict[str, list[int]]:
    """Bytes of a provider, each time anew; nothing if it cannot run."""
    sizes = []
    for _ in range(arguments.repeats):
        found = peaks(name, [shape], mode, arguments.dtype, arguments)
        if not found:
            return {}
        if found[shape]["source"] == "samples":
            print("\nnote: sampled memory, a lower bound of the peak.", file=sys.stderr)
        sizes.append(found[shape]["bytes"])
    return {name: sizes}


if __name__ == "__main__":
    main()
