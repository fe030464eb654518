"""Watch the target move: a page of the same examples every so many steps of a training."""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from ..training.trainer import QTargetSFTTrainer
from .collect import ROW_COLUMN, inspect_rows, numbered
from .render import write_page


logger = logging.getLogger(__name__)


class InspectionCallback(TrainerCallback):
    """Writes `step-000100.html` and so on, with the trainer's own target, model and prior.

    Args:
        trainer: the trainer, to which the callback is then added.
        dataset: a few examples, in any format of TRL; they are prepared as the training data is, but not packed.
        every: optimiser steps from one page to the next; the first is written before the first step.
        directory: where the pages go; None is `inspections` in the trainer's output folder.

    Raises:
        ValueError: `every` is below 1, or there are no examples.

    Examples:
        >>> trainer.add_callback(InspectionCallback(trainer, dataset.select(range(5)), every=100))
    """

    def __init__(
        self, trainer: QTargetSFTTrainer, dataset: Dataset, every: int, directory: "str | Path | None" = None
    ):
        if every < 1:
            raise ValueError(f"`every={every}` must be at least 1 optimiser step.")
        self.trainer, self.every = trainer, every
        self.directory = Path(directory or Path(trainer.args.output_dir) / "inspections")
        examples = numbered(dataset)
        self.given = {str(row[ROW_COLUMN]): row for row in examples}
        self.rows = trainer.prepare_rows(examples, "inspection")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._write(state.global_step)

    def _write(self, step: int) -> None:
        trainer = self.trainer
        name = getattr(trainer.model.config, "_name_or_path", "")
        facts = {"title": f"Step {step}", "model": name, "dataset": ""}
        try:
            data = inspect_rows(trainer, self.rows, [trainer.qtarget_config], facts, given=self.given)
            if trainer.is_world_process_zero():
                write_page(data, self.directory / f"step-{step:06d}.html")
        except (ValueError, OSError) as error:  # a policy that gives NaN, a full disk: not worth a training
            logger.warning(f"No inspection page of step {step}: {error}")
