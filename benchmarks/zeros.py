"""What tokens without a gradient save: the loss of `cft` at several shares of weights that are zero.

Beside it, in the same rounds, the same call with every token multiplied back, and the bare matrix products.

    python -m benchmarks.zeros
    python -m benchmarks.zeros --shapes 256x64x1000 --repeats 3 --output /tmp/zeros.csv
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss
from trl_qtarget.loss.zeros import ZeroSearch

from .budget import Budget
from .common import (
    DTYPES,
    base_parser,
    finish_arguments,
    interleave,
    progress_bar,
    ratio,
    summary,
    write_results,
)
from .inputs import Inputs, Shape, make_inputs
from .providers import floor


SHAPES = ("1024x576x49152",)
SHARES = (0.0, 0.25, 0.5, 0.75)
_CALLS_PER_SHARE = 3


@contextmanager
def _without_search() -> Iterator[None]:
    rows = ZeroSearch.rows
    ZeroSearch.rows = lambda search, target: None
    try:
        yield
    finally:
        ZeroSearch.rows = rows


def _call(inputs: Inputs, weights: Tensor) -> tuple[Tensor, ...]:
    output = linear_qtarget_loss(
        inputs.hidden, inputs.weight, inputs.labels, QTargetConfig("cft"), token_weights=weights
    )
    return torch.autograd.grad(output.loss, inputs.differentiable)


def _call_on_all(inputs: Inputs, weights: Tensor) -> tuple[Tensor, ...]:
    with _without_search():
        return _call(inputs, weights)


def _check(inputs: Inputs, weights: Tensor, dtype: torch.dtype) -> None:
    """Both ways have the same gradients, or no number is worth having."""
    close = 1e-5 if dtype == torch.float32 else 2e-2
    for found, whole in zip(_call(inputs, weights), _call_on_all(inputs, weights), strict=True):
        error = (found.float() - whole.float()).norm() / whole.float().norm()
        if not error < close:
            raise SystemExit(f"the gradients differ by {error:.2g}: nothing is timed.")


def _calls(inputs: Inputs, weights: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "floor/own": floor(inputs, False),
        "qtarget/cft": partial(_call, inputs, weights),
        "qtarget/cft, all multiplied back": partial(_call_on_all, inputs, weights),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=7)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="NxHxV; None: the head of SmolLM2-135M")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the first one that counts")
    arguments = finish_arguments(parser.parse_args(argv), "zeros")
    shapes = arguments.shapes or [Shape.parse(text) for text in SHAPES]
    dtype, groups = DTYPES[arguments.dtype], len(shapes) * len(SHARES) * 2
    budget = Budget(arguments.budget, groups)
    rounds = arguments.warmup + arguments.repeats
    with progress_bar(groups * rounds * _CALLS_PER_SHARE, "call") as progress:
        for shape in shapes:
            inputs = make_inputs(shape, dtype, arguments.device)
            order = torch.randperm(shape.N, generator=torch.Generator().manual_seed(0)).to(arguments.device)
            for mode, given in (("trainable", inputs), ("frozen", inputs.frozen())):
                for share in SHARES:
                    limit = budget.share(f"{shape} {mode} {share:.0%}")
                    if limit == 0:
                        continue
                    progress.set_description(f"{shape} {mode} {share:.0%}")
                    weights = (order >= share * shape.N).to(dtype)
                    _check(given, weights, dtype)
                    times = interleave(
                        _calls(given, weights), arguments.warmup, arguments.repeats, arguments.device, progress, limit
                    )
                    fixed = {"benchmark": f"zeros {share:.0%}", "mode": mode, "dtype": arguments.dtype, **vars(shape)}
                    rows = [
                        {
                            **fixed,
                            "metric": "seconds",
                            "provider": name,
                            **summary(values),
                            "floor_ratio": None if name.startswith("floor") else ratio(values, times["floor/own"]),
                        }
                        for name, values in times.items()
                    ]
                    write_results(arguments.output, rows, arguments.device)
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
