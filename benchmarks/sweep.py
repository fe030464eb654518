"""How time and memory of one loss call grow with the tokens N, the vocabulary V and the hidden width H.

From a base shape one of N, V, H is varied while the other two stay; then the dtype. Each point is timed beside the
bare matrix products, as in `benchmarks.head`, and its peak memory is taken as in `benchmarks.memory`, with the head
trainable and frozen. A row's benchmark names what is varied (`sweep N`).

    python -m benchmarks.sweep
    python -m benchmarks.sweep --base 512x64x4096 --N 256 512 --V 4096 8192 --H 32 64 --output /tmp/sweep.csv
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .budget import Budget
from .common import DTYPES, base_parser, finish_arguments, progress_bar, select, write_results
from .head import MODES, calls_of, timed_rows
from .inputs import Shape, make_inputs
from .memory import memory_rows, peaks
from .providers import PROVIDERS, available, fits


@dataclass(frozen=True)
class Grid:
    """The base shape and the values that each of its sizes takes in turn."""

    base: Shape
    N: tuple[int, ...]
    V: tuple[int, ...]
    H: tuple[int, ...]


# On a CPU, N·V is at least the 2^26 logits of one chunk: below that, memory still grows with both.
GRIDS = {
    "cpu": Grid(Shape(2048, 256, 32768), N=(2048, 4096, 8192), V=(32768, 65536, 131072), H=(128, 256, 512)),
    "cuda": Grid(
        Shape(8192, 4096, 151936),
        N=(2048, 4096, 8192, 16384),
        V=(32768, 65536, 131072, 262144),
        H=(1024, 2048, 4096, 8192),
    ),
}
AXES = ("N", "V", "H")
_PROVIDERS = ("qtarget/dft", "qtarget/target_sft", "trl/dft", "trl/forward_kl")
# Of the time budget, at most this much for memory, which is measured first.
_MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Point:
    """One shape and dtype of the sweep, and what is varied to get there."""

    axis: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.axis}: {self.shape} {self.dtype}"


def points_of(grid: Grid, dtype: str, dtypes: Sequence[str]) -> list[Point]:
    """Every point, those of one axis together."""
    points = [
        Point(axis, replace(grid.base, **{axis: size}), dtype) for axis in AXES for size in sorted(getattr(grid, axis))
    ]
    # At the fewest tokens: without tensor cores float32 takes ten times as long.
    return points + [Point("dtype", replace(grid.base, N=min(grid.N)), name) for name in dtypes]


def _memory(names: list[str], points: list[Point], arguments: Namespace) -> None:
    """Measure and write the memory of every point."""
    kinds = [(dtype, mode) for dtype in dict.fromkeys(point.dtype for point in points) for mode in arguments.modes]
    budget = Budget(None if arguments.budget is None else _MEMORY_SHARE * arguments.budget)
    with progress_bar(len(kinds) * len(names), "provider") as progress:
        for dtype, mode in kinds:
            progress.set_description(f"memory {dtype} {mode}")
            these = [point for point in points if point.dtype == dtype]
            # On a CPU one process of each provider measures them all, equal shapes of several axes only once.
            shapes = sorted({point.shape for point in these}, key=lambda shape: shape.N)
            found = {}
            for name in names:
                progress.set_postfix_str(name)
                if budget.begins(f"memory of {name} {mode} {dtype}"):
                    found[name] = peaks(name, shapes, mode, dtype, arguments)
                progress.update()
            rows = []
            for point in these:
                sizes = {name: [peak[point.shape]["bytes"]] for name, peak in found.items() if point.shape in peak}
                fixed = {"benchmark": f"sweep {point.axis}"}
                rows += [fixed | row for row in (memory_rows(sizes, point.shape, mode, dtype) if sizes else ())]
            write_results(arguments.output, rows, arguments.device)


def _time(names: list[str], points: list[Point], arguments: Namespace, budget: Budget) -> None:
    """Measure and write the time of every point."""
    with progress_bar(len(points) * len(arguments.modes) * calls_of(names, arguments), "call") as progress:
        for point in points:
            limit = budget.share(point)
            if limit == 0:
                continue
            progress.set_description(str(point))
            able = [name for name in names if fits(name, point.shape, arguments.device)]
            rows = []
            try:
                inputs = make_inputs(point.shape, DTYPES[point.dtype], arguments.device)
                for mode in arguments.modes:
                    given = inputs if mode == "trainable" else inputs.frozen()
                    fixed = {"benchmark": f"sweep {point.axis}", "mode": mode, "dtype": point.dtype}
                    share = limit / len(arguments.modes)
                    rows += [fixed | row for row in timed_rows(able, given, arguments, progress, share)]
            except torch.OutOfMemoryError:
                print(f"\n{point} is left out: not enough memory.", flush=True)
            inputs = given = None  # before the next point's are made
            write_results(arguments.output, rows, arguments.device)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=3)
    parser.set_defaults(providers=list(_PROVIDERS))
    parser.add_argument("--base", type=Shape.parse, help="NxHxV; None: by the device")
    for axis in AXES:
        parser.add_argument(f"--{axis}", nargs="*", type=int, help="its values; None: by the device")
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=list(DTYPES), help="compared with others")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the first one that counts")
    arguments = finish_arguments(parser.parse_args(argv), "sweep")
    names = available(select(PROVIDERS, arguments.providers), arguments.providers, arguments.device)
    given = {axis: tuple(getattr(arguments, axis)) for axis in AXES if getattr(arguments, axis) is not None}
    grid = replace(GRIDS[arguments.device], **given, **({"base": arguments.base} if arguments.base else {}))
    points = points_of(grid, arguments.dtype, arguments.dtypes)

    budget = Budget(arguments.budget, len(points))
    _memory(names, points, arguments)
    _time(names, points, arguments, budget)
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
