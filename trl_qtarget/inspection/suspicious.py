"""Labels that are probably wrong: those to which the target prefers another token."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import replacing


# An example is as suspicious as its worst tokens; the mean over all of a long one would hide a single wrong step.
WORST = 3


def suspicious_tokens(data: dict[str, Any], method: int = 0) -> list[dict[str, Any]]:
    """Every labelled token of an inspection, the most suspicious first.

    Args:
        data: what `inspect_target` returned.
        method: number of the method whose trust is meant.

    Returns:
        Rows with `example`, `position` (in its tokens), `token`, `method`, `suspicion` (nats by which the target
        prefers another token), `trust`, `nll` and `preferred`, the other token with most of the target's mass.
    """
    words, name = data["vocabulary"], data["methods"][method]["title"]
    rows = []
    for example in data["examples"]:
        found = example["methods"][method]
        for number, position in enumerate(example["scored"]):
            rows.append(
                {
                    "example": example["name"],
                    "position": position,
                    "token": words[str(example["tokens"][position])],
                    "method": name,
                    "suspicion": found["suspicion"][number],
                    "trust": found["trust"][number],
                    "nll": example["nll"][number],
                    "preferred": words[str(found["preferred"][number])],
                }
            )
    return sorted(rows, key=lambda row: -row["suspicion"])


def suspicious_examples(data: dict[str, Any], method: int = 0) -> list[dict[str, Any]]:
    """Every example with its suspicion, the mean of its highest three, the most suspicious first."""
    rows = []
    for example in data["examples"]:
        worst = sorted(example["methods"][method]["suspicion"], reverse=True)[:WORST]
        rows.append({"example": example["name"], "suspicion": sum(worst) / len(worst)})
    return sorted(rows, key=lambda row: -row["suspicion"])


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One line of JSON per row."""
    with replacing(path) as whole:
        whole.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
