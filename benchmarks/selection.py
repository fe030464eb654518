"""Which rows of the result files belong together: those of one machine with one set of versions."""

from pathlib import Path

from .common import read_results


BENCHMARKS = ("head", "memory", "sweep", "step", "statistics")
_FACTS = ("device", "machine", "threads", "torch", "trl", "transformers", "trl_qtarget")

Row = dict[str, str]


def facts(row: Row) -> tuple[str, ...]:
    """What two rows must share to be compared."""
    return tuple(row[name] for name in _FACTS)


def newest(folder: Path, device: str) -> dict[str, list[Row]]:
    """Rows by the name of their file, of the machine and versions that were measured last; without rows, no entry."""
    files = {name: read_results(folder / f"{name}-{device}.csv") for name in BENCHMARKS}
    dates: dict[tuple[str, ...], str] = {}
    for rows in files.values():
        for row in rows:
            dates[facts(row)] = max(row["date"], dates.get(facts(row), ""))
    if not dates:
        return {}
    # Of two that were measured on the same day, the one that stands first: a file keeps the order of its rows.
    chosen = max(dates, key=lambda group: dates[group])
    kept = {name: [row for row in rows if facts(row) == chosen] for name, rows in files.items()}
    return {name: rows for name, rows in kept.items() if rows}
