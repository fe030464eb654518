"""Write the README's section on speed and memory from the committed rows, between its two comments.

python -m benchmarks.readme
python -m benchmarks.readme --check     # 1 if the README does not say what the rows say
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from .common import RESULTS
from .models import title
from .selection import Row, newest


README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- performance: written by `python -m benchmarks.readme` from the rows in benchmarks/results -->"
END = "<!-- end of performance -->"
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_WAYS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
_HEADS = {"trainable": "trained", "frozen": "frozen"}
_LIBRARIES = {"liger": "Liger", "cce": "cut cross-entropy", "compile": "`torch.compile`"}


def section(results: Path = RESULTS) -> str:
    """The Markdown between the comments."""
    cpu, cuda = newest(results, "cpu"), newest(results, "cuda")
    parts = []
    if "head" in cuda:
        parts += _of_device(cuda)
    else:
        parts.append(
            "GPU figures are still to be measured: `python -m benchmarks` measures all of them on one GPU within 8 "
            "minutes, and writes them here."
        )
    parts += _of_device(cpu)
    return "\n\n".join(part if part.startswith(("|", "!")) else _wrapped(part) for part in parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _of_device(results: dict[str, list[Row]]) -> list[str]:
    """Paragraphs and table of one machine, which the first names; what was not measured is not spoken of."""
    if "head" not in results:
        return []
    writers = {"head": _head, "memory": _memory, "sweep": _sweep, "step": _step, "statistics": _statistics}
    parts = [part for name, write in writers.items() for part in write(results.get(name, []))]
    dates = sorted({row["date"] for name in writers for row in results.get(name, [])})
    parts.append(f"The rows, and the code that they are of, have the dates {' and '.join(dates)}.")
    if results["head"][0]["device"] == "cpu":
        parts.append(
            "Part of TRL's distance on a CPU is that its Triton kernels fall back to plain torch there, so these "
            "figures say nothing about a GPU. `make bench` measures again on your machine; "
            "[benchmarks/README.md](benchmarks/README.md) says how."
        )
    return parts


# --- words ---


def _count(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


def _machine(row: Row) -> str:
    if row["device"] == "cuda":
        return f"one {row['machine']} ({_DTYPES[row['dtype']]}"
    cores = int(row["threads"])
    return f"{_count(cores)} CPU {'core' if cores == 1 else 'cores'} ({row['machine']}, {_DTYPES[row['dtype']]}"


def _repeats(rows: Sequence[Row]) -> str:
    counts = sorted({int(row["repeats"]) for row in rows})
    return _count(counts[0]) if len(counts) == 1 else f"{_count(counts[0])} to {_count(counts[-1])}"


def _shape(row: Row) -> str:
    return f"{row['N']} × {row['H']} × {row['V']}"


def _factor(row: Row | None, column: str) -> str:
    return f"{float(row[column]):.2f}" if row and row[column] else "–"


def _gigabytes(size: float) -> str:
    """Two digits: 0.43, 4.6, 10."""
    size /= 1e9
    return f"{size:.2g}" if size < 9.95 else f"{size:.0f}"


def _one(rows: Sequence[Row], **wanted: str) -> Row | None:
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


# --- paragraphs ---


def _head(rows: list[Row]) -> list[str]:
    """Ratios to the floor and to TRL; and others' libraries, where they were measured."""
    if not rows:
        return []
    first = rows[0]
    rows = [row for row in rows if row["dtype"] == first["dtype"]]
    table = [
        "| N × H × V | head | `dft` ÷ floor | `dft` ÷ TRL's `dft` | `target_sft` with a reference ÷ floor "
        "| ÷ TRL's forward KL |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape, mode in dict.fromkeys((_shape(row), row["mode"]) for row in rows):
        group = [row for row in rows if (_shape(row), row["mode"]) == (shape, mode)]
        dft, target = (_one(group, provider=f"qtarget/{name}") for name in ("dft", "target_sft"))
        if dft is None and target is None:
            continue
        cells = [shape, _HEADS[mode], _factor(dft, "floor_ratio"), _factor(dft, "trl_ratio")]
        cells += [_factor(target, "floor_ratio"), _factor(target, "trl_ratio")]
        table.append(f"| {' | '.join(cells)} |")
    parts = [
        f"Forward and backward of one loss call on {_machine(first)}, medians of {_repeats(rows)} interleaved "
        f"{'round' if _repeats(rows) == 'one' else 'rounds'}; "
        f"torch {first['torch'].split('+')[0]}, trl {first['trl']}; all rows in "
        "[benchmarks/results](benchmarks/results)). The floor is the bare matrix products that the loss cannot do "
        "without, measured in the same run.",
        "\n".join(table),
    ]
    return parts + _libraries(rows)


def _libraries(rows: list[Row]) -> list[str]:
    """One sentence with the ratios to the floor of others' libraries, where the head is trained."""
    found = []
    for row in rows:
        package, method = row["provider"].split("/")
        if row["device"] == "cuda" and package in _LIBRARIES and row["mode"] == "trainable" and row["floor_ratio"]:
            found.append(f"{_LIBRARIES[package]} {_factor(row, 'floor_ratio')} (`{method}`, {_shape(row)})")
    return [f"In the same rounds with a trained head, ÷ floor: {', '.join(found)}."] if found else []


def _memory(rows: list[Row]) -> list[str]:
    """What `dft` and `target_sft` need, and what others need."""
    # Where a machine has several shapes, that of the largest logits.
    rows = sorted((row for row in rows if row["mode"] == "trainable"), key=lambda row: int(row["N"]) * int(row["V"]))
    last = [row for row in rows if _shape(row) == _shape(rows[-1]) and row["dtype"] == rows[-1]["dtype"]]
    sizes = {row["provider"]: float(row["median"]) for row in last}
    if not {"qtarget/dft", "floor/returned"} <= set(sizes):
        return []
    texts = {name: f"{_gigabytes(size)} GB" for name, size in sizes.items()}
    place = f"N = {int(last[0]['N'])}, V = {int(last[0]['V']):,}, H = {int(last[0]['H'])}"
    text = (
        f"Memory beyond the inputs, returned gradients ({texts['floor/returned']}) included, at {place} with a "
        f"trained head: {texts['qtarget/dft']} for `dft`"
    )
    text += f" (TRL's {texts['trl/dft']})" if "trl/dft" in texts else ""
    if "qtarget/target_sft" in texts:
        text += f" and {texts['qtarget/target_sft']} for `target_sft` with a reference"
        others = {"trl/forward_kl": "TRL's forward KL", "dense/target_sft": "dense logits"}
        found = [f"{words} {texts[name]}" for name, words in others.items() if name in texts]
        text += f" ({', '.join(found)})" if found else ""
    return [f"{text}."]


def _sweep(rows: list[Row]) -> list[str]:
    """How much time per token and memory of `dft` change with N, and the figure of all sizes."""
    frozen = [row for row in rows if row["provider"] == "qtarget/dft" and row["mode"] == "frozen"]
    along = {
        metric: sorted(
            (row for row in frozen if row["benchmark"] == "sweep N" and row["metric"] == metric),
            key=lambda row: int(row["N"]),
        )
        for metric in ("seconds", "bytes")
    }
    if not all(len(found) > 1 for found in along.values()):
        return []
    times, sizes = along["seconds"], along["bytes"]
    growth = float(times[-1]["median"]) / float(times[0]["median"])
    returned = [int(row["N"]) * int(row["H"]) * {"fp32": 4, "bf16": 2}[row["dtype"]] for row in sizes]
    beyond = [_gigabytes(float(row["median"]) - size) for row, size in zip(sizes, returned, strict=True)]
    row = times[0]
    text = (
        f"From {times[0]['N']} to {times[-1]['N']} tokens (V = {int(row['V']):,}, H = {row['H']}, frozen head) the "
        f"time of `dft` grows {growth:.1f}-fold, and its memory beyond inputs and returned gradients goes from "
        f"{beyond[0]} to {beyond[-1]} GB."
    )
    figure = f"docs/figures/benchmark-sweep-{row['device']}.svg"
    return [text, f"![Time per token and memory by N, V and H]({figure})"]


def _step(rows: list[Row]) -> list[str]:
    """Training steps as multiples of TRL's."""
    if not rows:
        return []
    model = title(int(rows[0]["H"]), int(rows[0]["V"]))
    sizes = f"{model}'s sizes" if model else f"width {rows[0]['H']} and vocabulary {rows[0]['V']}"
    same = _ratios(rows, "dft", _WAYS)
    # In full fine-tuning, without a reference model, it has no prior but the policy.
    own, given = _ratios(rows, "target_sft", ("lora", "qlora")), _ratios(rows, "target_sft+reference", _WAYS)
    sentences = [f"`dft` takes {same} of the time of TRL's `dft`"] if same else []
    if own:
        sentences.append(f"`target_sft`, which also runs its base as prior, {own} of the time of TRL's `nll`")
    if given:
        sentences.append(f"`target_sft` with a reference model {given} of the time of TRL's `nll`")
    if not sentences:
        return []
    start = f"Whole training steps of a model of {sizes}, {rows[0]['N']} tokens, medians of {_repeats(rows)}: "
    return [f"{start}{'; '.join(sentences)}."]


def _statistics(rows: list[Row]) -> list[str]:
    """What the logged statistics cost a step, in percent of it without them."""
    costs = sorted(100 * (float(row["floor_ratio"]) - 1) for row in rows if row["floor_ratio"])
    if not costs:
        return []
    cost = " to ".join(dict.fromkeys(f"{cost:.1f}" for cost in (costs[0], costs[-1])))
    return [f"What is logged beside the loss takes at most {cost}% of such a step."]


def _ratios(rows: Sequence[Row], name: str, modes: Iterable[str]) -> str:
    """How long a provider takes beside TRL's, way by way: `0.70 (full fine-tuning) and 0.87 (LoRA)`."""
    found = [(mode, _one(rows, provider=f"qtarget/{name}", mode=mode)) for mode in modes]
    items = [f"{_factor(row, 'trl_ratio')} ({_WAYS[mode]})" for mode, row in found if row and row["trl_ratio"]]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


# --- the file ---


def replaced(text: str, new: str) -> str:
    """A README with another section between the comments.

    Raises:
        ValueError: it has not each of the two comments once, in their order.
    """
    pattern = f"{re.escape(BEGIN)}\n.*?{re.escape(END)}"
    if len(re.findall(pattern, text, re.DOTALL)) != 1:
        raise ValueError(f"The README must have a section between `{BEGIN}` and `{END}`.")
    return re.sub(pattern, lambda _: f"{BEGIN}\n\n{new}\n\n{END}", text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Write the section, or check it; 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where something would change")
    arguments = parser.parse_args(argv)
    old = README.read_text(encoding="utf-8")
    new = replaced(old, section())
    if arguments.check:
        if new != old:
            print("README.md does not say what benchmarks/results say: run `python -m benchmarks.readme`.")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    print(f"Written: {README.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
