"""The training script behind `trl-qtarget sft`; `python -m trl_qtarget.cli.sft` runs it in this process.

It is `trl sft` with `QTargetSFTTrainer`: every argument of that script, every field of `QTargetConfig`, and a
reference model with how to load it.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    get_peft_config,
    get_quantization_config,
)

from ..lock import one_run_in
from ..priors.choice import PolicyFacts, choose_prior
from ..priors.resolved import ResolvedTarget
from ..priors.store import PriorCache
from ..target.config import QTargetConfig
from ..training.checkpoints import check_checkpoint, last_whole_checkpoint
from ..training.resolve import resolve_config
from ..training.trainer import QTargetSFTTrainer
from .data import check_format, load_data, split_of
from .device import cpu_words
from .errors import in_launch, is_mistake, say, take_debug, write_anywhere
from .models import ReferenceArguments, check_extras, check_named, init_kwargs, load_reference
from .noise import quiet
from .recipe import Parser, names_given, recipe_of, separated


NO_GPU = "no GPU was found: this runs on the CPU."


@dataclass
class RunArguments:
    """How a run goes on."""

    allow_new_target: bool = field(
        default=False,
        metadata={"help": "Resume although the target, or the weights of its prior, are not the checkpoint's."},
    )

    def __post_init__(self):
        if not isinstance(self.allow_new_target, bool):
            raise ValueError(
                f"`allow_new_target` must be true or false, got `{type(self.allow_new_target).__name__}`."
            )


# Everything that a recipe of a training may hold.
RECIPE = (
    ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, QTargetConfig, ReferenceArguments, RunArguments
)  # fmt: skip


def make_parser(prog: str | None = None) -> Parser:
    """Parser of every argument; YAML by `--config`, with the command line winning."""
    return Parser(RECIPE, prog=prog)


def main(arguments: Sequence[str]) -> int:
    """Train, save and, if asked, push.

    Returns:
        0; 2 where an argument is wrong, which has then been said. What fails in the training itself is raised.
    """
    write_anywhere()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)  # it says which target is trained toward
    arguments = separated(take_debug(arguments))
    trainer = None
    with ExitStack() as held, quiet():
        try:
            if not in_launch() and (on_cpu := cpu_words(names_given(arguments))):
                arguments = [*arguments, *on_cpu]
                say("sft", NO_GPU)
            parsed = make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False)
            script, training, model, mixture, target, reference, run = parsed
            # First of all: two runs in a folder would also choose its checkpoints over each other.
            held.enter_context(one_run_in(training.output_dir))
            config = resolve_config(target_of(arguments, target), training)
            check_named(model, reference, training.model_init_kwargs)
            check_extras(model, reference)
            checkpoint = checkpoint_of(training, resolved_target(config, model, reference), run.allow_new_target)
            trainer = make_trainer(script, training, model, mixture, config, reference)
            started = _Started()
            trainer.add_callback(started)
            trainer.train(resume_from_checkpoint=checkpoint, allow_new_target=run.allow_new_target)
        except Exception as error:
            if not is_mistake(error, began=trainer is not None and started.step):
                raise
            say("sft", error)
            return 2
        except KeyboardInterrupt:
            if not in_launch():  # else the launching process says it, once
                say("sft", interrupted(training.output_dir) if trainer is not None else "interrupted.")
            return 128 + signal.SIGINT
        trainer.save_model(training.output_dir)
        trainer.save_state()  # whose log `plot --runs` draws
        trainer.accelerator.print(f"Saved to {training.output_dir}.")
        if training.push_to_hub:
            trainer.push_to_hub(dataset_name=script.dataset_name)
            trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
        trainer.accelerator.wait_for_everyone()  # rank 0 is still writing; who left before would look like a failure
        trainer.accelerator.end_training()
    return 0


class _Started(TrainerCallback):
    """Whether the first step has begun: what fails before is a matter of arguments, models and data."""

    step = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = True


def interrupted(output_dir: str) -> str:
    """What Ctrl-C leaves behind, in one line."""
    if (checkpoint := last_whole_checkpoint(output_dir)) is None:
        return f"interrupted; there is no whole checkpoint in {output_dir}."
    return f"interrupted; the last whole checkpoint is {checkpoint} (`--resume_from_checkpoint true` goes on from it)."


def make_trainer(
    script: ScriptArguments,
    training: SFTConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    config: QTargetConfig,
    reference: ReferenceArguments,
) -> QTargetSFTTrainer:
    """The trainer that the arguments describe, with its models and data loaded."""
    training.model_init_kwargs = {**init_kwargs(model, training), **(training.model_init_kwargs or {})}
    dataset = load_data(script, mixture)
    check_format(dataset, training)
    return QTargetSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=split_of(dataset, script.dataset_train_split, "dataset_train_split"),
        eval_dataset=(
            None
            if training.eval_strategy == "no"
            else split_of(dataset, script.dataset_test_split, "dataset_test_split")
        ),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        qtarget_config=config,
        ref_model=load_reference(reference, training),
        prior_cache=reference.prior_cache,
    )


def resolved_target(config: QTargetConfig, model: ModelConfig, reference: ReferenceArguments) -> ResolvedTarget:
    """What will be trained toward, which is known before anything is loaded.

    Raises:
        ValueError: the target cannot have its prior.
    """
    policy = PolicyFacts.of(model.model_name_or_path or "", get_peft_config(model))
    cache = None if reference.prior_cache is None else PriorCache(reference.prior_cache)
    return ResolvedTarget.of(config, choose_prior(config, policy, reference.ref_model_name_or_path, cache))


def checkpoint_of(training: SFTConfig, target: ResolvedTarget, allow_new_target: bool = False) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `true` for the last whole one of `output_dir`.

    Raises:
        ValueError: there is none, it is not whole, or it was trained toward another target and that is not allowed.
    """
    wanted = training.resume_from_checkpoint
    if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # as a command line says it
        wanted = wanted.lower() == "true"
    if not isinstance(wanted, str | bool | None):
        raise ValueError(f"`resume_from_checkpoint` must be a folder, true or false, got `{type(wanted).__name__}`.")
    if not wanted:
        return None
    checkpoint = last_whole_checkpoint(training.output_dir) if wanted is True else wanted
    check_checkpoint(checkpoint, target, allow_new_target)
    return checkpoint


def target_of(arguments: Sequence[str], target: QTargetConfig) -> QTargetConfig | None:
    """The target that was asked for; None without a word about it: then TRL's own `loss_type` may name one."""
    return target if target != QTargetConfig() or names_method(arguments) else None


def names_method(arguments: Sequence[str]) -> bool:
    """Whether the command line or its YAML file names a method, be it the default one."""
    arguments = separated(arguments)
    return any(item.partition("=")[0] == "--method" for item in arguments) or "method" in recipe_of(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
