"""Time of the pieces of one chunk, each by the code that a training step runs: what `paper.py` predicts of them.

python -m benchmarks.gpu.pieces --shapes 8192x4096x151936
python -m benchmarks.gpu.pieces --shapes 64x32x500 --device cpu --output /tmp/pieces.csv
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from trl_qtarget import QTargetConfig, gemm
from trl_qtarget.gemm import Head
from trl_qtarget.loss.choice import make_kernel
from trl_qtarget.loss.chunks import STATISTICS, Batch

from ..budget import Budget
from ..common import DTYPES, base_parser, finish_arguments, progress_bar, summary, synchronize, write_results
from ..inputs import Inputs, Shape, make_inputs
from .paper import SHAPES, Call, piece_provider


METHODS = ("dft", "target_sft")
_WARMUP = 3


def _timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call; on CUDA between two events of its stream, so without the launch."""
    synchronize(device)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def pieces(call: Call, inputs: Inputs, kernel: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by the names of `paper.py`. They run in this order: one works on what the one before has left."""
    method = QTargetConfig(call.method)
    objective = method.objective(has_prior=call.reference)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    given = {
        "objective": objective,
        "head": Head(weight),
        "hidden": hidden,
        "labels": inputs.labels,
        "prior_head": Head(inputs.prior_weight) if call.reference else None,
        "prior_hidden": inputs.prior_hidden if call.reference else None,
        "token_weights": None,
        "sequence_ids": None,
        "chunk_tokens": call.tokens,
    }
    batch = Batch(**given, kernel=make_kernel(kernel, given))
    chunk = slice(0, call.tokens)
    gradients = torch.zeros_like(weight, dtype=batch.dtype)
    of_hidden = torch.zeros_like(hidden, dtype=batch.dtype)
    rows = {name: batch.logits.new_zeros(len(hidden)) for name in STATISTICS}
    inverse = batch.logits.new_ones(()) / len(hidden)
    made: dict[str, Any] = {}

    def fold() -> None:
        made["slope"] = batch.kernel.slope(batch.head, batch.logits)
        made["tile"] = batch._tile(chunk, batch.logits, batch.prior_logits)

    def small() -> None:
        made["target"] = objective.target(made["tile"], None)
        batch._record(rows, chunk, made["target"])

    def write() -> None:
        made["out"] = batch.kernel.gradient_of(batch.logits, batch.operands)
        batch.kernel.write_gradient(made["out"], made["target"], inverse, made["slope"])

    found = {"logits": lambda: gemm.project(batch.logits, hidden[chunk], batch.weight, batch.operands)}
    if call.reference:
        found["logits of the reference"] = lambda: gemm.project(
            batch.prior_logits, inputs.prior_hidden[chunk], batch.prior_weight, batch.prior_operands
        )
    found |= {"fold": fold, "small operations": small, "gradient of the logits": write}
    found["gradient of the hidden states"] = lambda: gemm.backproject(
        of_hidden[chunk], made["out"], batch.weight, batch.operands
    )
    if call.trained:
        found["gradient of the head"] = lambda: gemm.accumulate_weight(
            gradients, made["out"], hidden[chunk], batch.operands
        )
        found["head's gradient: zeros"] = lambda: torch.zeros_like(gradients)
        found["head's gradient: narrowed"] = lambda: made.update(narrow=gradients.to(weight.dtype))
        found["head's gradient: times the scalar"] = lambda: made["narrow"].mul_(inverse)
    return found


def measure(
    call: Call, inputs: Inputs, kernel: str, device: str, repeats: int, budget: Budget
) -> list[dict[str, Any]]:
    """Rows of a result file; seconds of each piece, over rounds of all pieces."""
    calls = pieces(call, inputs, kernel)
    times: dict[str, list[float]] = {name: [] for name in calls}
    host = []
    with torch.no_grad():
        for number in range(_WARMUP + repeats):
            if number > _WARMUP and budget.left == 0:
                break
            for name, each in calls.items():
                elapsed = _timed(each, device)
                if number >= _WARMUP:
                    times[name].append(elapsed)
            # What Python takes to ask for a whole chunk: it must stay below the chunk's own time.
            synchronize(device)
            begun = time.perf_counter()
            for name, each in calls.items():
                if not name.startswith("head's"):
                    each()
            if number >= _WARMUP:
                host.append(time.perf_counter() - begun)
    fixed = {"mode": call.method, **vars(replace(call.shape, N=call.tokens)), "metric": "seconds"}
    rows = [{**fixed, "provider": piece_provider(name), **summary(values)} for name, values in times.items()]
    print(f"{call.method} at {call.shape}: Python asks for a chunk in {1e3 * statistics.median(host):.2f} ms.")
    return [*rows, {**fixed, "provider": "piece/host", **summary(host)}]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=10)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=list(SHAPES), help="NxHxV")
    parser.add_argument("--kernel", choices=["auto", "torch", "triton"], default="auto")
    arguments: argparse.Namespace = finish_arguments(parser.parse_args(argv), "pieces")
    budget = Budget(arguments.budget)
    with progress_bar(len(arguments.shapes) * len(METHODS), "chunk") as progress:
        for shape in arguments.shapes:
            inputs = None
            for method in METHODS:
                if not budget.begins(f"{method} at {shape}"):
                    continue
                inputs = inputs or make_inputs(shape, DTYPES[arguments.dtype], arguments.device)
                call = Call(shape, reference=method == "target_sft")
                found = measure(call, inputs, arguments.kernel, arguments.device, arguments.repeats, budget)
                fixed = {"benchmark": "pieces", "dtype": arguments.dtype}
                write_results(arguments.output, [fixed | row for row in found], arguments.device)
                progress.update()
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
