"""What the trainer writes to disk, and how it goes on from there."""

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate.logging import get_logger
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..priors.adapters import are_trained
from ..priors.base import Prior
from ..priors.choice import PriorChoice, name_of
from ..priors.own import STATE_NAME
from ..priors.record import PriorRecord, fingerprints
from ..priors.resolved import ResolvedTarget
from ..target.config import QTargetConfig
from .card import add_names, add_target
from .checkpoints import check_checkpoint, clear_state, last_whole_checkpoint, settled_as_in
from .trackers import TargetForTrackers


logger = get_logger(__name__)

# Of models on the hub.
_TAG = "trl-qtarget"


def _with_own_tag(tags: str | Iterable[str] | None) -> list[str]:
    given = [tags] if isinstance(tags, str) else list(tags or ())
    return given if _TAG in given else [*given, _TAG]


class CheckpointMixin:
    """Checkpoints and model cards that know the target, for a `transformers.Trainer` to inherit before its own."""

    model: nn.Module
    qtarget_config: QTargetConfig
    prior_choice: PriorChoice
    _prior: Prior | None
    _may_change_prior = False
    _fingerprints: Mapping[str, str] = MappingProxyType({})

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        allow_new_target: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.train`, which goes on from whole checkpoints only, and only toward their target.

        Args:
            resume_from_checkpoint (`str` or `bool`): a checkpoint; `True` is the last one in `args.output_dir` that
                was not interrupted while it was written.
            allow_new_target (`bool`, defaults to `False`): whether to resume although `qtarget_config`, or the weights
                of its prior, differ from those that the checkpoint was trained toward.

        Raises:
            ValueError: the checkpoint does not exist, is not whole, lacks the state of optimiser, schedule or random
                numbers, or was trained toward another target.
        """
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            check_checkpoint(resume_from_checkpoint, self.resolved_target, allow_new_target)
            self._settle_as_in(resume_from_checkpoint)
            self._may_change_prior = allow_new_target
        elif self.prior_choice.warning_if_trained and are_trained(self.model):
            logger.warning(self.prior_choice.warning_if_trained)
        logger.info(self.resolved_target.line)
        trackers = TargetForTrackers(self._facts)
        self.callback_handler.callbacks.insert(0, trackers)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            trackers.end(self.args)
            self.remove_callback(trackers)

    @property
    def resolved_target(self) -> ResolvedTarget:
        """The target that is really trained toward: what was asked for, with its prior and every knob."""
        return ResolvedTarget.of(self.qtarget_config, self.prior_choice)

    def _facts(self) -> dict[str, Any]:
        self._settle(self.model_wrapped)
        return self.resolved_target.facts()

    def _settle_as_in(self, checkpoint: str | None) -> None:
        """What the data has decided stays decided: the policy knows other things by now."""
        if checkpoint is not None and self.qtarget_config.open_knobs:
            self._take(settled_as_in(checkpoint, self.qtarget_config))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` looks whether it is done after each step, so a finished run would take one more when it is resumed.
        if self.state.global_step >= self.state.max_steps:
            logger.info(f"All {self.state.max_steps} steps have been trained: nothing is left to do.")
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._save_target(output_dir or self.args.output_dir)
        if not _internal_call and output_dir in (None, self.args.output_dir):
            self.create_model_card()  # else only checkpoints and pushes would write one

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if len(args) < 3:  # the place of `tags` in transformers and in TRL
            kwargs["tags"] = _with_own_tag(kwargs.get("tags"))
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            add_target(card, self.resolved_target)
            add_names(card, self.args.output_dir, name_of(self.model))
            # Beside the card, for whatever is pushed while training goes on.
            self._save_target(self.args.output_dir)

    def _save_target(self, directory: str | os.PathLike) -> None:
        target = self.resolved_target
        target.config.save_pretrained(directory, target.provenance)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            clear_state(Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()  # else it could take away what another rank has just written
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # PEFT reads adapters as float32, but those of a quantised model are trained in bfloat16: the run would go on
        # with other roundings than it began with, and need more memory.
        dtypes = {name: value.dtype for name, value in self.model.named_parameters() if value.requires_grad}
        with self._prior.policy_loads() if self._prior is not None else nullcontext():
            super()._load_from_checkpoint(*args, **kwargs)
        for name, value in self.model.named_parameters():
            if value.dtype != dtypes.get(name, value.dtype):
                value.data = value.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        with self._prior.policy_loads() if self._prior is not None else nullcontext():
            super()._load_best_model()
        best = Path(self.state.best_model_checkpoint)
        if (best / STATE_NAME).is_file():
            self._prior.load(best)

    def _prior_record(self) -> PriorRecord:
        fixed = {} if self._prior is None else self._prior.fixed_parameters()
        self._fingerprints = fingerprints(fixed, self._fingerprints)
        return PriorRecord.of(self.prior_choice, dict(self._fingerprints))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        record = self._prior_record()
        if self.args.should_save:
            record.save(output_dir)
        if self._prior is not None:
            self._prior.save(output_dir, self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What follows marks the checkpoint as whole, so every rank has to be done.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        former = None if checkpoint is None or self._may_change_prior else PriorRecord.load(checkpoint)
        if former is not None:
            self._prior_record().check_same(former, checkpoint)
        if self._prior is not None and checkpoint is not None and os.path.isdir(checkpoint):
            self._prior.load(checkpoint)
