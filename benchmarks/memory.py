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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

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
from .providers import PROVIDERS, available, fits


# A large vocabulary on a narrow model: most of the memory is the loss's own, and a CPU finishes in reasonable time.
SHAPES = ("4096x256x151936",)

# Every provider once at this size before the measured call, so that thread pools and workspaces exist by then.
_WARMUP_SHAPE = Shape(8, 16, 64)


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


def measure(name: str, shape: Shape, mode: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
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


def _measure_apart(name: str, shape: Shape, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", "--providers", name, "--shapes", str(shape)]
    command += ["--modes", mode, "--dtype", arguments.dtype, "--device", arguments.device]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    # glibc: give every large block back when it is freed, so that none is handed out again uncounted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} at {shape} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_here(name: str, shape: Shape, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in this process, with the allocator's caches empty."""
    torch.cuda.empty_cache()
    return measure(name, shape, mode, DTYPES[arguments.dtype], arguments.device)


def _returned_gradients(shape: Shape, mode: str, dtype: torch.dtype) -> int:
    rows = shape.N + (shape.V if mode == "trainable" else 0)
    return rows * shape.H * dtype.itemsize


def _rows(sizes: dict[str, list[int]], returned: int, fixed: dict[str, Any]) -> list[dict[str, Any]]:
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
    dtype = DTYPES[arguments.dtype]
    if arguments.measure:
        print(json.dumps(measure(names[0], arguments.shapes[0], arguments.modes[0], dtype, arguments.device)))
        return

    # PyTorch's allocator counts exactly, whatever ran before; resident memory needs a process of its own.
    measured = _measure_here if arguments.device == "cuda" else _measure_apart
    runs = len(arguments.shapes) * len(arguments.modes) * len(names) * arguments.repeats
    with progress_bar(runs, "process") as progress:
        for shape in arguments.shapes:
            for mode in arguments.modes:
                progress.set_description(f"{shape} {mode}")
                sizes: dict[str, list[int]] = {}
                sources = set()
                for name in names:
                    if not fits(name, shape, arguments.device):
                        print(f"\nskipped {name}: not enough free memory for full logits.", file=sys.stderr)
                        progress.update(arguments.repeats)
                        continue
                    for _ in range(arguments.repeats):
                        progress.set_postfix_str(name)
                        result = measured(name, shape, mode, arguments)
                        sizes.setdefault(name, []).append(result["bytes"])
                        sources.add(result["source"])
                        progress.update()
                if "samples" in sources:
                    print("\nnote: sampled memory, a lower bound of the peak.", file=sys.stderr)
                fixed = {"benchmark": "memory", "mode": mode, **vars(shape), "dtype": arguments.dtype}
                rows = _rows(sizes, _returned_gradients(shape, mode, dtype), fixed | {"metric": "bytes"})
                write_results(arguments.output, rows, arguments.device)
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
