"""How many operations a GPU is asked for between the products of a chunk, counted without a GPU.

The fused loss runs on two chunks and on three; what three need more is the price of a chunk. Every operation that
PyTorch dispatches is counted but for views and empty tensors; one that launches several kernels (a top-k, a scan)
counts as one. The Triton kernels and the products stand aside, each counted as one launch.

    python -m benchmarks.gpu.launches
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from trl_qtarget import METHODS, QTargetConfig, gemm, linear_qtarget_loss
from trl_qtarget.loss import choice, chunks
from trl_qtarget.loss.kernels import fold, folded, gradient
from trl_qtarget.loss.zeros import ZeroSearch


# Make a tensor or look at one in another way, and launch nothing.
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh")
PRODUCTS, KERNELS = "products", "kernels"


class Launches(TorchDispatchMode):
    """Counts operations that work on a device, by name; `products` and `kernels` are those that stand aside."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        views = any(
            value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns
        )
        if not views and name not in _FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class _Launched:
    """Stands for a Triton kernel, or for a product of a GPU."""

    def __init__(self, counter: Launches, name: str):
        self.counter, self.name = counter, name

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options) -> None:
        self.counter.counts[self.name] += 1


class _Folded(_Launched):
    """Stands for the kernel that folds, and leaves tokens of which some are surprising: not all have a gradient."""

    def __call__(self, logits: Tensor, prior: Tensor, labels: Tensor, out: Tensor, *arguments, **options) -> None:
        super().__call__()
        with _disable_current_modes():
            out.copy_(torch.linspace(0.1, 3, out.size(1)))


@contextmanager
def as_on_a_gpu(counter: Launches) -> Iterator[None]:
    """The path of a CUDA device with products of float32 results, on tensors of a CPU."""
    product = _Launched(counter, PRODUCTS)
    with ExitStack() as stack:
        for module, name, value in (
            (fold, "fold_kernel", _Folded(counter, KERNELS)),
            (gradient, "gradient_kernel", _Launched(counter, KERNELS)),
            (folded, "_launch", lambda logits, group=0: {}),
            (gemm, "_MIXED", {"mm": product, "addmm": product}),
            (gemm, "_mm", product),
            (gemm, "_addmm", product),
            (gemm, "_tried", lambda product, device, contiguous=True: gemm.Support()),
            (choice, "check_kernel", lambda name, device: None),
            (chunks, "ZeroSearch", lambda objective, device: ZeroSearch(objective, torch.device("cuda"))),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


def _counted(config: QTargetConfig, tokens: int, chunk_tokens: int) -> Counter[str]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    hidden, weight = random(tokens, 8).requires_grad_(), random(64, 8).requires_grad_()
    given = {
        "token_weights": torch.rand(tokens, generator=generator),
        "sequence_ids": torch.zeros(tokens, dtype=torch.int64),
    }
    if config.objective(has_prior=True).uses_prior:
        given |= {"prior_hidden": random(tokens, 8), "prior_weight": random(64, 8)}
    labels = torch.randint(64, (tokens,), generator=generator)
    config.chunk_tokens, config.kernel = chunk_tokens, "triton"
    counter = Launches()
    with as_on_a_gpu(counter), counter:
        linear_qtarget_loss(hidden, weight, labels, config, **given)
    return counter.counts


@cache
def per_chunk(method: str) -> Counter[str]:
    """Operations of one chunk, by name."""
    # What a trainer measures is a number by then.
    config = QTargetConfig(method, **{name: 1.0 for name, knob in METHODS[method].knobs.items() if knob == "auto"})
    few, many = (_counted(config, tokens, 8) for tokens in (16, 24))
    many.subtract(few)
    return +many


def small(counts: Counter[str]) -> int:
    """Of them, those that are neither a product nor one of the Triton kernels."""
    return sum(number for name, number in counts.items() if name not in (PRODUCTS, KERNELS))


def table() -> str:
    """All methods, as a Markdown table."""
    lines = ["| method | products | Triton kernels | other operations |", "|---|---:|---:|---:|"]
    for name in METHODS:
        counts = per_chunk(name)
        lines.append(f"| `{name}` | {counts[PRODUCTS]} | {counts[KERNELS]} | {small(counts)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table, or the operations of one method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--method", choices=list(METHODS), help="name its operations")
    arguments = parser.parse_args(argv)
    if arguments.method is None:
        print(table())
        return
    for name, number in per_chunk(arguments.method).most_common():
        print(f"{number:4d}  {name}")


if __name__ == "__main__":
    main()
