"""Three sets apart: what is trained on, what the search looks at, and what only the confirmation sees."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import replacing
from .answers import final_answer


# What is taken from the training data where there is no held-out split: so many rows, at most this share.
HELD_OUT, HELD_OUT_SHARE = 512, 0.2
SETS = ("train", "search", "confirm")


@dataclass(frozen=True)
class Sets:
    """The sets, as files `train.parquet`, `search.parquet` and `confirm.parquet` in a folder."""

    folder: Path

    @property
    def train(self) -> Path:
        """What every training of the study reads."""
        return self.folder / "train.parquet"

    def rows(self, name: str) -> Dataset:
        """One of the sets."""
        return Dataset.from_parquet(str(self.folder / f"{name}.parquet"))

    def counts(self) -> dict[str, int]:
        """How many rows each has."""
        return json.loads((self.folder / "sets.json").read_text(encoding="utf-8"))["rows"]


def split(train: Dataset, held_out: Dataset | None, share: int | None, seed: int) -> dict[str, Dataset]:
    """The three sets. No prompt is in two of them.

    Args:
        train: the training rows.
        held_out: rows to search and confirm on; None takes them from `train`.
        share: how many rows are taken from `train`, or of `held_out` at most; None is `HELD_OUT`, at most
            `HELD_OUT_SHARE` of `train`, or all of `held_out`.
        seed: of the shuffle.

    Raises:
        ValueError: too few rows are left.
    """
    if held_out is None:
        count = min(HELD_OUT, int(HELD_OUT_SHARE * len(train))) if share is None else share
        if not 2 <= count < len(train):
            raise ValueError(
                f"`held_out={count}` of {len(train)} training rows cannot be: give a number from 2 to less than that, "
                "or name `problems`, or a dataset with a test split."
            )
        shuffled = train.shuffle(seed=seed)
        held_out, train = shuffled.select(range(count)), shuffled.select(range(count, len(train)))
        # The larger set gives way: what is held out is small, and has to be new to the model.
        seen = set(map(identity, held_out))
        kept = [number for number, row in enumerate(train) if identity(row) not in seen]
        train = train.select(kept)
        share = None
    else:
        seen = set(map(identity, train))
        held_out = held_out.select([number for number, row in enumerate(held_out) if identity(row) not in seen])
    first: dict[str, int] = {}
    for number, row in enumerate(held_out):
        first.setdefault(identity(row), number)
    held_out = held_out.select(list(first.values())).shuffle(seed=seed)
    if share is not None:
        held_out = held_out.select(range(min(share, len(held_out))))
    half = len(held_out) // 2
    if half < 1 or not len(train):
        raise ValueError(
            f"`held_out` leaves {len(train)} rows to train on and {len(held_out)} for search and confirmation, once "
            "prompts that are in two sets are left out: more rows are needed."
        )
    return {
        "train": train,
        "search": held_out.select(range(half)),
        "confirm": held_out.select(range(half, len(held_out))),
    }


def identity(row: dict[str, Any]) -> str:
    """Equal for rows that ask the same: of the prompt where there is one, else of the whole row."""
    if "prompt" in row:
        asked = row["prompt"]
    elif "messages" in row:
        asked = row["messages"][:-1] or row["messages"]
    else:
        asked = row
    if isinstance(asked, list):
        # A column of messages has every key of any message.
        asked = [{key: value for key, value in message.items() if value is not None} for message in asked]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def with_answers(rows: Dataset) -> Dataset:
    """Rows with `prompt` and `answer`, for judged answers.

    The prompt is `prompt` or `problem`, or the messages without the last; the answer is `answer`, or what ends the
    completion: its last number, or else its last line.

    Raises:
        ValueError: the columns are not there.
    """
    return Dataset.from_list([_asked(row) for row in rows])


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    messages = row.get("messages")
    prompt = row.get("prompt", row.get("problem", messages and messages[:-1]))
    if isinstance(prompt, list):
        prompt = [{"role": each["role"], "content": each["content"]} for each in prompt]
    answer = row.get("answer")
    if answer is None:
        completion = row.get("completion", messages and messages[-1:])
        if completion:
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            answer = final_answer(text, text)
    if not prompt or answer is None or answer == "":
        raise ValueError(
            "`metric` judges answers: the held-out rows need `prompt` (or `problem`) with `answer` or `completion`, "
            f"or `messages` that end with the assistant's; one has: {', '.join(row)}."
        )
    if isinstance(prompt, str) and "problem" in row and "prompt" not in row:
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "answer": str(answer)}


def write(sets: dict[str, Dataset], folder: Path) -> Sets:
    """Write the sets, once: who finds them there and of the same content leaves them.

    Raises:
        ValueError: other sets lie there.
    """
    digests = {name: _digest(rows) for name, rows in sets.items()}
    facts = {"rows": {name: len(rows) for name, rows in sets.items()}, "digests": digests}
    whole = folder / "sets.json"
    if whole.is_file():
        if json.loads(whole.read_text(encoding="utf-8"))["digests"] != digests:
            raise ValueError(
                f"`output_dir`: {folder} holds other sets: the data have changed since the study began. Choose "
                "another folder, or go on with the data of before."
            )
        return Sets(folder)
    for name, rows in sets.items():
        with replacing(folder / f"{name}.parquet") as unfinished:
            rows.to_parquet(str(unfinished))
    with replacing(whole) as unfinished:
        unfinished.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return Sets(folder)


def _digest(rows: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
