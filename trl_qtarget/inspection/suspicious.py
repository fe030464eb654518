"""Labels that are probably wrong: those to which the target prefers another token."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import replacing


# An example is as suspicious as its worst tokens; the mean over all of a long one would hide a single wrong step.
WORST = 3


def suspicious_method(data: dict[str, Any]) -> int:
    """The number of the last method that prefers another token to some label: one that has suspicion at all.

    Raises:
        ValueError: none has, as `sft`, whose target is the label.
    """
    for number in reversed(range(len(data["methods"]))):
        if any(any(example["methods"][number]["suspicion"]) for example in data["examples"]):
            return number
    titles = ", ".join(f"`{method['title']}`" for method in data["methods"])
    raise ValueError(
        f"no label is suspicious to {titles}, whose target prefers no other token to any of them: name a method that "
        "trusts some labels less, such as `dft`."
    )


def suspicious_tokens(
    data: dict[str, Any], method: int | None = None, assistant_only: bool = False
) -> list[dict[str, Any]]:
    """Every labelled token of an inspection, the most suspicious first.

    In a conversation of which not only the assistant's turns are labelled, these come first: they are what a user of
    the dataset can change, and the template's own tokens would drown them.

    Args:
        data: what `inspect_target` returned.
        method: number of the method whose trust is meant; None is the last one that has suspicion.
        assistant_only: whether to leave out the labels that are not of an assistant's turn.

    Returns:
        Rows with `example`, `position` (in its tokens), `token`, `method`, `assistant` (whether it is of an
        assistant's turn; None where all labels are, or it is not known), `suspicion` (nats by which the target prefers
        another token), `trust`, `nll` and `preferred`, the other token with most of the target's mass.

    Raises:
        ValueError: no method has suspicion.
    """
    method = suspicious_method(data) if method is None else method
    words, name = data["vocabulary"], data["methods"][method]["title"]
    rows = []
    for example in data["examples"]:
        found, turns = example["methods"][method], example.get("assistant")
        for number, position in enumerate(example["scored"]):
            rows.append(
                {
                    "example": example["name"],
                    "position": position,
                    "token": words[str(example["tokens"][position])],
                    "method": name,
                    "assistant": None if turns is None else turns[number],
                    "suspicion": found["suspicion"][number],
                    "trust": found["trust"][number],
                    "nll": example["nll"][number],
                    "preferred": words[str(found["preferred"][number])],
                }
            )
    if assistant_only:
        rows = [row for row in rows if row["assistant"] is not False]
    return sorted(rows, key=lambda row: (row["assistant"] is False, -row["suspicion"]))


def suspicious_examples(data: dict[str, Any], method: int | None = None) -> list[dict[str, Any]]:
    """Every example with its suspicion, the mean of its highest three, the most suspicious first.

    Where other labels than those of the assistant's turns are known, they do not count.

    Raises:
        ValueError: no `method` is given, and none has suspicion.
    """
    method = suspicious_method(data) if method is None else method
    rows = []
    for example in data["examples"]:
        found, turns = example["methods"][method]["suspicion"], example.get("assistant")
        kept = found if turns is None or not any(turns) else [x for x, own in zip(found, turns, strict=True) if own]
        worst = sorted(kept, reverse=True)[:WORST]
        rows.append({"example": example["name"], "suspicion": sum(worst) / len(worst)})
    return sorted(rows, key=lambda row: -row["suspicion"])


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One line of JSON per row."""
    with replacing(path) as whole:
        whole.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
