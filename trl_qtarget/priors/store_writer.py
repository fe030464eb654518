"""A prior's cache, written: by one process or many, at once or after each other, with the same bytes.

The work is cut into units, each a shard, by the dataset alone. A process takes a unit by a lock that the system gives
back however the process ends, so what was killed is taken up by whoever comes next. What a unit holds depends on
nothing but its examples: two processes that make the same one, as on a file system without locks, write the same file.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from ..files import replacing
from .store import MANIFEST, Manifest


# A shard's size: what a killed process loses, and what is hashed at once.
SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class Example:
    """An example of the dataset that is to be cached.

    Attributes:
        key: of its content.
        row: where the dataset has it.
        positions: its labelled tokens, ascending, from 1 on.
    """

    key: bytes
    row: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Examples of one shard."""

    name: str
    examples: tuple[Example, ...]

    @property
    def rows(self) -> int:
        return sum(len(example.positions) for example in self.examples)


def units_of(examples: Sequence[Example], manifest: Manifest, shard_bytes: int = SHARD_BYTES) -> list[Unit]:
    """The work, cut into shards: by the examples in their order, and by nothing else."""
    units, part, size = [], [], 0
    for example in examples:
        part.append(example)
        size += len(example.positions) * manifest.row_bytes
        if size >= shard_bytes:
            units.append(_unit(part, manifest))
            part, size = [], 0
    return [*units, _unit(part, manifest)] if part else units


def _unit(examples: Sequence[Example], manifest: Manifest) -> Unit:
    digest = hashlib.sha256(manifest.identity.encode())
    for example in examples:
        digest.update(example.key + json.dumps(example.positions).encode())
    return Unit(digest.hexdigest()[:16], tuple(examples))


def begin(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a new cache, or see that the one that is there says the same.

    Raises:
        ValueError: the folder holds a cache of something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f".{MANIFEST}.{uuid.uuid4().hex}"
    unfinished.write_text(manifest.to_json(), encoding="utf-8")
    try:
        os.link(unfinished, directory / MANIFEST)  # fails where there is one, unlike a rename
    except FileExistsError:
        found = Manifest.load(directory)
        if found.identity != manifest.identity:
            names = [name for name in vars(manifest) if getattr(found, name) != getattr(manifest, name)]
            name = next(name for name in names if name != "package")
            raise ValueError(
                f"`output_dir`: {directory} holds another cache, whose `{name}` is {getattr(found, name)!r} and not "
                f"{getattr(manifest, name)!r}: choose another folder."
            ) from None
    except OSError:  # a file system without hard links
        if not (directory / MANIFEST).exists():
            os.replace(unfinished, directory / MANIFEST)
        elif Manifest.load(directory).identity != manifest.identity:
            raise ValueError(f"`output_dir`: {directory} holds another cache: choose another folder.") from None
    finally:
        unfinished.unlink(missing_ok=True)


def write(
    directory: Path,
    units: Sequence[Unit],
    say: Callable[[Unit], Mapping[str, Tensor]],
    done: Callable[[Unit], None] = lambda unit: None,
    wait: float = 1.0,
) -> None:
    """Write the shards of all units that are not there yet; return when all are.

    Args:
        directory: of the cache.
        units: the work, the same for all who share it.
        say: what the prior says of a unit's rows, by field.
        done: called with every unit that is there.
        wait: seconds between two looks at what others are making.
    """
    left = list(units)
    while left:
        taken_by_others = []
        for unit in left:
            if not is_there(directory, unit):
                with _taken(directory, unit) as lock:
                    if lock is None:
                        taken_by_others.append(unit)
                        continue
                    if not is_there(directory, unit):
                        if lock.is_locked:
                            _clear(directory, unit)
                        _write_shard(directory, unit, say(unit))
            done(unit)
        left = taken_by_others
        if left:
            time.sleep(wait)


def is_there(directory: Path, unit: Unit) -> bool:
    """Whether a unit's shard has been written."""
    return any(directory.glob(f"{unit.name}-*.safetensors"))


@contextmanager
def _taken(directory: Path, unit: Unit) -> Iterator[FileLock | None]:
    """A unit's lock, held, or None where another process has it. It is not held where the file system has no locks."""
    (directory / ".locks").mkdir(exist_ok=True)
    lock = FileLock(directory / ".locks" / unit.name)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield None
        return
    except (OSError, NotImplementedError):
        pass
    try:
        yield lock
    finally:
        if lock.is_locked:
            lock.release()


def _clear(directory: Path, unit: Unit) -> None:
    """Take away what those who had the lock before, and were killed, have left unfinished."""
    for unfinished in directory.glob(f".{unit.name}.*"):
        unfinished.unlink(missing_ok=True)


def _write_shard(directory: Path, unit: Unit, said: Mapping[str, Tensor]) -> None:
    lengths = [len(example.positions) for example in unit.examples]
    keys = np.frombuffer(b"".join(example.key for example in unit.examples), dtype=np.uint8).reshape(-1, 16)
    tensors = {
        "keys": torch.from_numpy(keys.copy()),
        "starts": torch.tensor([0, *np.cumsum(lengths).tolist()]),
        "positions": torch.tensor([at for example in unit.examples for at in example.positions], dtype=torch.int32),
        **{name: value.contiguous() for name, value in said.items()},
    }
    write_tensors(directory, f"{unit.name}-", tensors)


def write_tensors(directory: Path, begins: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a file that is whole or not there, whose name begins so and goes on with the SHA-256 of its bytes."""
    data = save(dict(tensors))
    unfinished = directory / f".{begins[:-1]}.{uuid.uuid4().hex}"
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, directory / f"{begins}{hashlib.sha256(data).hexdigest()[:16]}.safetensors")


def write_card(directory: Path, manifest: Manifest) -> None:
    """Say in the cache's folder what it is."""
    with replacing(directory / "README.md") as file:
        file.write_text(_card(manifest), encoding="utf-8")


def _card(manifest: Manifest) -> str:
    what = (
        "`hidden[R, H]`, the final hidden states before the head, which is in `head.*.safetensors`"
        if manifest.form == "hidden"
        else "`ids[R, k]` and `log_probs[R, k]`, the most probable tokens; `label_log_probs[R]`; `rest_log_mass[R]`, "
        "the log-probability of all other tokens together"
        + (", NaN where the prior's own tokens say nothing of the label" if manifest.own_tokenizer else "")
    )
    return f"""---
tags: [trl-qtarget, distillation]
---

# What {manifest.prior} has said

Written by `trl-qtarget cache` {manifest.package}; `manifest.json` says of which model. To train toward it:
`QTargetSFTTrainer(..., prior_cache="this folder")`, or `trl-qtarget sft --prior_cache`.

Every `*-*.safetensors` is a shard of examples, and a row of it one labelled token (`safetensors.torch.load_file`):
`keys[E, 16]`, BLAKE2b-128 of an example's token ids as little-endian int64; `starts[E + 1]`, its rows are `starts[e]`
to `starts[e + 1]`; `positions[R]`, the token's place in its example; {what}. Logarithms are natural. What is said of
the token at a position comes from those before it. The last part of a file's name begins its SHA-256.
"""
