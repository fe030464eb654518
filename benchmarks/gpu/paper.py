"""The time of one loss call on paper: bytes and floating-point operations of every piece, and a GPU's time for them.

A piece takes the longer of its two times, operations over the rate of the products and bytes over the bandwidth of
memory; the pieces follow each other. Rates are the published peaks times a share that long products and copies reach.
What was measured stands beside it where there are rows of such a GPU.

    python -m benchmarks.gpu.paper            # the tables of docs/gpu.md
    python -m benchmarks.gpu.paper --write    # into the page
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common import RESULTS, read_results
from ..inputs import Shape
from . import launches


PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
_START = "<!-- gpu-paper: written by `python -m benchmarks.gpu.paper --write` -->"
_END = "<!-- end of gpu-paper -->"

_MIB, _GIB = 2**20, 2**30
_HALF, _SINGLE = 2, 4  # bytes of a number
# TRL's issue 7244 and Liger's 1422.
SHAPES = (Shape(8192, 4096, 151936), Shape(8192, 4096, 131072))
# As `loss/chunks.py` has it for a GPU with 8 GiB to spare: logits of a chunk, the policy's and the prior's together.
CHUNK_BYTES = 512 * _MIB
# A short kernel with the gap behind it.
SMALL_SECONDS = 4e-6


@dataclass(frozen=True)
class Gpu:
    """Published peaks: bf16 products without sparsity, and memory; the shares of them that are reached."""

    name: str
    flops: float
    bandwidth: float
    product_share: float = 0.8
    memory_share: float = 0.9

    def seconds(self, flops: float, moved: float) -> float:
        """Time of a piece: the longer of two."""
        return max(flops / (self.flops * self.product_share), moved / (self.bandwidth * self.memory_share))


GPUS = (Gpu("H100", 989.4e12, 3.35e12), Gpu("H200", 989.4e12, 4.8e12))


@dataclass(frozen=True)
class Piece:
    """A product, a kernel or a pass: floating-point operations and bytes, once; and how often in a call."""

    name: str
    flops: float
    moved: float
    times: int = 1


@dataclass(frozen=True)
class Call:
    """One loss call with its backward pass: shape, whether it reads a reference model, whether the head is trained."""

    shape: Shape
    reference: bool = False
    trained: bool = True
    chunk_bytes: int = CHUNK_BYTES

    @property
    def method(self) -> str:
        """The method that stands for it."""
        return "target_sft" if self.reference else "dft"

    @property
    def chunks(self) -> int:
        """Chunks of a call."""
        most = max(1, self.chunk_bytes // ((1 + self.reference) * _SINGLE * self.shape.V))
        return -(-self.shape.N // most)

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return -(-self.shape.N // self.chunks)

    def products(self) -> list[Piece]:
        """The products of a chunk."""
        n, width, vocabulary = self.tokens, self.shape.H, self.shape.V
        flops = 2 * n * width * vocabulary
        hidden, head, logits = n * width, width * vocabulary, n * vocabulary
        into_logits = _HALF * (hidden + head) + _SINGLE * logits
        into_hidden = _HALF * (logits + head) + _SINGLE * hidden
        found = [Piece("logits", flops, into_logits, self.chunks)]
        if self.reference:
            found.append(Piece("logits of the reference", flops, into_logits, self.chunks))
        found.append(Piece("gradient of the hidden states", flops, into_hidden, self.chunks))
        if self.trained:
            found.append(of_head(self.shape, n, self.chunks))
        return found

    def passes(self, small: int) -> list[Piece]:
        """The Triton kernels of a chunk, and `small` operations on numbers per token, which cost their launches."""
        logits = self.tokens * self.shape.V
        read = _SINGLE * logits * (1 + self.reference)
        return [
            Piece("fold", 0, read, self.chunks),
            Piece("gradient of the logits", 0, read + _HALF * logits, self.chunks),
            Piece(f"{small} small operations", 0, 0, self.chunks),
        ]

    def once(self) -> list[Piece]:
        """What a call does once: zeros to sum into, gradients in the dtype of their tensors, times the scalar."""
        hidden, head = self.shape.N * self.shape.H, self.shape.H * self.shape.V
        # Gathered; zeros; narrowed, and spread over zeros; multiplied.
        found = [Piece("rows gathered and spread", 0, hidden * ((1 + self.reference) * 4 + 4 + 6 + 2 + 4 + 4))]
        if self.trained:
            found.append(Piece("head's gradient: zeros", 0, _SINGLE * head))
            found.append(Piece("head's gradient: narrowed", 0, (_SINGLE + _HALF) * head))
            found.append(Piece("head's gradient: times the scalar", 0, 2 * _HALF * head))
        return found

    def seconds(self, gpu: Gpu, small: int) -> float:
        """Predicted time of the call."""
        pieces = [*self.products(), *self.passes(small), *self.once()]
        return sum(piece.times * gpu.seconds(piece.flops, piece.moved) for piece in pieces) + (
            self.chunks * small * SMALL_SECONDS
        )

    def floor(self, gpu: Gpu) -> float:
        """The bare products over all tokens, in bf16, as the benchmark times them."""
        n, width, vocabulary = self.shape.N, self.shape.H, self.shape.V
        moved = _HALF * (n * width + width * vocabulary + n * vocabulary)
        return (2 + self.reference + self.trained) * gpu.seconds(2 * n * width * vocabulary, moved)

    @property
    def memory(self) -> int:
        """Bytes beyond inputs and returned gradients: a chunk, and what the sums have more than what is returned."""
        logits = (1 + self.reference) * _SINGLE * self.tokens * self.shape.V
        gathered = (1 + self.reference) * _HALF * self.shape.N * self.shape.H
        head = _SINGLE * self.shape.H * self.shape.V if self.trained else 0
        return logits + gathered + _SINGLE * self.shape.N * self.shape.H + head


def of_head(shape: Shape, tokens: int, times: int) -> Piece:
    """The product into the gradient of the head, of so many tokens: it reads and writes all of its float32 sums."""
    logits, head = tokens * shape.V, shape.H * shape.V
    moved = _HALF * (logits + tokens * shape.H) + 2 * _SINGLE * head
    return Piece("gradient of the head", 2 * tokens * shape.H * shape.V, moved, times)


# --- what was measured ---


def _measured(rows: Sequence[dict[str, str]], gpu: Gpu, shape: Shape, tokens: int, provider: str, mode: str) -> str:
    """Seconds of the newest row of such a GPU, in ms; a dash if there is none."""
    wanted = {"provider": provider, "mode": mode, "N": str(tokens), "H": str(shape.H), "V": str(shape.V)}
    found = [row for row in rows if gpu.name in row["machine"] and wanted.items() <= row.items()]
    if not found:
        return "–"
    return f"{1e3 * float(max(found, key=lambda row: row['date'])['median']):.2f}"


# --- tables ---


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _header(*names: str, left: int = 1) -> list[str]:
    return [_row(*names), _row(*(["---"] * left + ["---:"] * (len(names) - left)))]


def calls_table(results: Path) -> str:
    """Whole calls: time, over the floor, memory."""
    rows = read_results(results / "head-cuda.csv")
    lines = _header(
        "N × H × V", "method", "head", *(f"{gpu.name}: ms, measured, ÷ floor" for gpu in GPUS), "memory, GiB", left=3
    )
    for shape in SHAPES:
        for reference in (False, True):
            for trained in (True, False):
                call = Call(shape, reference, trained)
                small = launches.small(launches.per_chunk(call.method))
                cells = []
                for gpu in GPUS:
                    taken = call.seconds(gpu, small)
                    mode = "trainable" if trained else "frozen"
                    measured = _measured(rows, gpu, shape, shape.N, f"qtarget/{call.method}", mode)
                    cells.append(f"{1e3 * taken:.1f}, {measured}, {taken / call.floor(gpu):.2f}")
                name = f"`{call.method}`" + (" with a reference" if reference else "")
                sizes = f"{shape.N} × {shape.H} × {shape.V}"
                head = "trained" if trained else "frozen"
                lines.append(_row(sizes, name, head, *cells, f"{call.memory / _GIB:.2f}"))
    return "\n".join(lines)


def pieces_table(call: Call, results: Path) -> str:
    """The pieces of one call, a chunk's and those of once."""
    rows = read_results(results / "pieces-cuda.csv")
    small = launches.small(launches.per_chunk(call.method))
    lines = _header("piece", "times", "GFLOP", "MB", *(f"{gpu.name}: ms, measured" for gpu in GPUS))
    for piece in (*call.products(), *call.passes(small), *call.once()):
        cells = []
        for gpu in GPUS:
            taken = small * SMALL_SECONDS if "small" in piece.name else gpu.seconds(piece.flops, piece.moved)
            measured = _measured(rows, gpu, call.shape, call.tokens, piece_provider(piece.name), call.method)
            cells.append(f"{1e3 * taken:.3f}, {measured}")
        lines.append(_row(piece.name, piece.times, f"{piece.flops / 1e9:.0f}", f"{piece.moved / 1e6:.0f}", *cells))
    return "\n".join(lines)


def piece_provider(name: str) -> str:
    """The name of a piece in a file of results."""
    return "piece/" + ("small operations" if "small" in name else name)


def chunk_table(shape: Shape) -> str:
    """The float32 gradient of the head against the size of a chunk."""
    lines = _header(
        "chunk, MiB", "tokens", "chunks", "traffic, GB a call", *(f"{gpu.name}: ms a call" for gpu in GPUS)
    )
    for size in (64, 128, 256, 512, 1024, 2048):
        call = Call(shape, chunk_bytes=size * _MIB)
        piece = of_head(shape, call.tokens, call.chunks)
        traffic = call.chunks * 2 * _SINGLE * shape.H * shape.V
        cells = [f"{1e3 * piece.times * gpu.seconds(piece.flops, piece.moved):.1f}" for gpu in GPUS]
        lines.append(_row(size, call.tokens, call.chunks, f"{traffic / 1e9:.0f}", *cells))
    return "\n".join(lines)


def _of_head_in_all(call: Call, together: int, gpu: Gpu) -> float:
    """Seconds of a call in the product into the head's gradient, with so many chunks at once."""
    whole, rest = divmod(call.chunks, together)
    counts = [together] * whole + [rest] * bool(rest)
    pieces = [of_head(call.shape, count * call.tokens, 1) for count in counts]
    return sum(gpu.seconds(piece.flops, piece.moved) for piece in pieces)


def super_chunk_table(shape: Shape, reference: bool) -> str:
    """What it would save to keep the gradients of several chunks, and multiply them into the head's at once."""
    call = Call(shape, reference)
    lines = _header(
        "chunks at once", "tokens", "more memory, MiB", *(f"{gpu.name}: ms saved of a call" for gpu in GPUS)
    )
    small = launches.small(launches.per_chunk(call.method))
    for together in (1, 2, 4, call.chunks):
        tokens = min(shape.N, together * call.tokens)
        more = 0 if together == 1 else _HALF * tokens * shape.V
        cells = []
        for gpu in GPUS:
            saved = max(0.0, _of_head_in_all(call, 1, gpu) - _of_head_in_all(call, together, gpu))
            cells.append(f"{1e3 * saved:.1f} ({saved / call.seconds(gpu, small):.0%})")
        lines.append(_row(together, tokens, f"{more / _MIB:.0f}", *cells))
    return "\n".join(lines)


def text(results: Path = RESULTS) -> str:
    """All tables, with headings."""
    first = SHAPES[0]
    sizes = f"{first.N} × {first.H} × {first.V}"
    peaks = "; ".join(f"{gpu.name} {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s" for gpu in GPUS)
    return "\n\n".join(
        [
            f"Published peaks of the SXM cards, bf16 without sparsity: {peaks}. Taken: {GPUS[0].product_share:.0%} of "
            f"the former, {GPUS[0].memory_share:.0%} of the latter, and {1e6 * SMALL_SECONDS:.0f} µs for a small "
            "operation with its gap. – is what has not been measured.",
            "### Whole calls",
            calls_table(results),
            f"### Pieces of `dft`, {sizes}, head trained",
            pieces_table(Call(first), results),
            f"### Pieces of `target_sft` with a reference, {sizes}, head trained",
            pieces_table(Call(first, reference=True), results),
            f"### The head's gradient against the size of a chunk (`dft`, {sizes})",
            chunk_table(first),
            f"### Several chunks into the head's gradient at once (`dft`, {sizes})",
            super_chunk_table(first, False),
            f"### The same with a reference ({sizes})",
            super_chunk_table(first, True),
            "### Operations of a chunk",
            launches.table(),
        ]
    )


def replaced(page: str, new: str) -> str:
    """The page with other tables between its marks."""
    before, _, rest = page.partition(_START)
    _, mark, after = rest.partition(_END)
    if not mark:
        raise ValueError(f"the page must have a section between {_START} and {_END}.")
    return f"{before}{_START}\n\n{new}\n\n{mark}{after}"


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with head-cuda.csv and pieces-cuda.csv")
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    arguments = parser.parse_args(argv)
    if arguments.write:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), text(arguments.results)), encoding="utf-8")
    else:
        print(text(arguments.results))


if __name__ == "__main__":
    main()
