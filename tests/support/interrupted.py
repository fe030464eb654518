"""Runs that are killed, and runs that go on from what is left: `python interrupted.py runs.json [fsdp2]`.

Every run is a process of its own, forked after the slow imports. Under a launcher (`RANK` is set) there is only one.
"""

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cells import Cell, InOrder, begin_job, make, result_of
from fsdp2 import FSDP2


SAVE_STEPS = 2
_KILLED_AT = 4
# Between two checkpoints, and at three places of the one that step 4 writes.
MOMENTS = ("between", "weights", "optimizer", "state")


@dataclass(frozen=True)
class Interruption:
    """A run in `folder`: killed at `moment`, or to its end; from the beginning, or from what an earlier one left."""

    cell: Cell
    folder: str
    moment: str | None = None
    resume: bool = False


class _Mortal:
    """Put before a trainer class: dies at the named moment."""

    moment: str | None = None
    from_step: int | None = None

    def _die(self, moment: str) -> None:
        if moment == self.moment and self.state.global_step == _KILLED_AT - (moment == "between"):
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, *args, **kwargs):
        self.from_step = self.state.global_step if self.from_step is None else self.from_step
        self._die("between")
        return super().training_step(*args, **kwargs)

    def save_model(self, *args, **kwargs):
        super().save_model(*args, **kwargs)
        self._die("weights")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self._die("optimizer")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.moment == "state" and self.state.global_step == _KILLED_AT:
            text = json.dumps(asdict(self.state))
            (Path(output_dir) / "trainer_state.json").write_text(text[: len(text) // 2])
        self._die("state")


def train(run: Interruption, trainer_class: type) -> None:
    """Do one run; one that reaches its end leaves `result.json` and `result.safetensors` in its folder."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = {"save_strategy": "steps", "save_steps": SAVE_STEPS, **run.cell.options}
    cell = Cell(run.cell.method, run.cell.prior, run.cell.peft, options)
    trainer = make(cell, run.folder, processes, type("Mortal", (_Mortal, trainer_class), {}))
    trainer.moment = run.moment
    trainer.train(resume_from_checkpoint=run.resume)
    result = result_of(trainer, {"from_step": trainer.from_step})
    if int(os.environ.get("RANK", 0)) == 0:
        result.save(Path(run.folder) / "result")


def main(file: str, backend: str = "") -> None:
    trainer_class = FSDP2 if backend == "fsdp2" else InOrder
    runs = [Interruption(Cell(**values.pop("cell")), **values) for values in json.loads(Path(file).read_text())]
    if "RANK" in os.environ:
        begin_job()
        train(*runs, trainer_class)
        return
    for run in runs:
        child = os.fork()
        if child == 0:
            train(run, trainer_class)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
