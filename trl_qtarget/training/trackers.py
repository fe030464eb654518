"""The target in the run configuration of trackers, so that their runs can be grouped by it."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainingArguments


class TargetForTrackers(TrainerCallback):
    """Adds facts to what `args.to_dict()` gives while a training begins, which is when every tracker asks for it.

    It has to stand before them in the list of callbacks. Afterwards the arguments are as they were: checkpoints hold
    them, and are read where this package is not.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]]):
        self.facts = facts

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        own, facts = type(args).to_dict, self.facts()
        args.__dict__["to_dict"] = lambda: own(args) | facts

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.end(args)

    def end(self, args: TrainingArguments) -> None:
        """Leave the arguments as they were."""
        args.__dict__.pop("to_dict", None)
