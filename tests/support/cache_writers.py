"""A process that writes its share of a small cache, slowly."""

import time
from pathlib import Path

import torch
from torch import Tensor

from trl_qtarget.priors.store import Manifest, key_of
from trl_qtarget.priors.store_writer import Example, Unit, begin, units_of, write


MANIFEST = Manifest("top_k", 11, "tokens", "a teacher", None, None, "float32", None, "weights", k=2)
EXAMPLES = [Example(key_of([row]), row, tuple(range(1, 2 + row % 5))) for row in range(90)]


def say(unit: Unit, seconds: float) -> dict[str, Tensor]:
    """Numbers that depend on the example alone."""
    time.sleep(seconds)
    rows = torch.tensor([[example.row, at] for example in unit.examples for at in example.positions])
    numbers = -rows.float()
    return {"ids": rows.int(), "log_probs": numbers, "label_log_probs": numbers[:, 0], "rest_log_mass": numbers[:, 1]}


def main(folder: Path, seconds: float) -> None:
    """Write what is not there yet; every shard takes some seconds."""
    begin(folder, MANIFEST)
    write(folder, units_of(EXAMPLES, MANIFEST, 200), lambda unit: say(unit, seconds), wait=0.05)
