"""Print the results in benchmarks/results (or in the files named) as Markdown tables.

python -m benchmarks.report
python -m benchmarks.report benchmarks/results/head-cpu.csv --providers qtarget trl
"""

import argparse
from itertools import groupby
from pathlib import Path

from .common import RESULTS, read_results
from .selection import BENCHMARKS


_TITLES = {
    "head": "Loss from hidden states and LM head, forward and backward",
    "memory": "Peak memory of one loss call beyond its inputs, returned gradients included",
    "step": "Whole training step",
    **{f"sweep {size}": f"Loss by {size}, with the rest of the shape fixed" for size in ("N", "V", "H", "dtype")},
    "statistics": "Training step with and without the logged statistics",
}
_FLOORS = {
    "head": "bare matrix products",
    "memory": "returned gradients",
    **{f"sweep {size}": "floor" for size in ("N", "V", "H", "dtype")},
    "statistics": "without statistics",
}


def _quantity(row: dict[str, str], column: str) -> str:
    value = float(row[column])
    if row["metric"] == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _factor(text: str) -> str:
    return f"{float(text):.2f}×" if text else "–"


def _group(row: dict[str, str]) -> tuple[str, ...]:
    facts = ("benchmark", "device", "machine", "threads", "torch", "trl", "transformers", "trl_qtarget")
    return tuple(row[name] for name in facts)


def table(rows: list[dict[str, str]]) -> str:
    """One Markdown table with a line of facts; all rows are of one benchmark and machine."""
    first = rows[0]
    threads = f", CPU threads: {first['threads']}" if first["device"] == "cpu" else ""
    dates = " to ".join(sorted({min(row["date"] for row in rows), max(row["date"] for row in rows)}))
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "trl", "transformers", "trl_qtarget"))
    floor = _FLOORS.get(first["benchmark"])
    heads = ["N × H × V", "mode", "provider", "median", "min – max"]
    heads += ([f"÷ {floor}"] if floor else []) + ["÷ TRL"]
    lines = [
        f"### {_TITLES[first['benchmark']]}",
        "",
        f"{first['machine']}{threads}; {versions}; {dates}.",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|---|---|{'---:|' * (len(heads) - 3)}",
    ]
    for row in rows:
        cells = [
            f"{row['N']} × {row['H']} × {row['V']} {row['dtype']}",
            row["mode"],
            f"`{row['provider']}`",
            _quantity(row, "median"),
            f"{_quantity(row, 'min')} – {_quantity(row, 'max')}",
        ]
        cells += ([_factor(row["floor_ratio"])] if floor else []) + [_factor(row["trl_ratio"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Print benchmark results as Markdown tables.")
    parser.add_argument("files", nargs="*", type=Path, help="CSV files; none: all in benchmarks/results")
    parser.add_argument("--providers", nargs="+", help="only these names or groups, such as trl/dft or qtarget")
    arguments = parser.parse_args(argv)
    results = [file for name in BENCHMARKS for file in sorted(RESULTS.glob(f"{name}-*.csv"))]
    rows = [row for path in arguments.files or results for row in read_results(path)]
    if arguments.providers:
        wanted = arguments.providers
        rows = [row for row in rows if row["provider"] in wanted or row["provider"].split("/")[0] in wanted]
    if not rows:
        raise SystemExit("no results: run a benchmark first, or name other files.")
    rows.sort(key=_group)
    print("\n\n".join(table(list(group)) for _, group in groupby(rows, key=_group)))


if __name__ == "__main__":
    main()
