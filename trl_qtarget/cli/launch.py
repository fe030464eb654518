"""`trl-qtarget sft`: check the arguments, and hand them to `accelerate launch`."""

import importlib.resources
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser
from trl import SFTConfig

from ..training.resolve import resolve_config
from .data import check_data
from .device import cpu_words, threads_each
from .errors import check_installed, one_launch, say
from .models import check_extras, check_named
from .options import check_known, refuse, suggestion
from .recipe import names_given, separated
from .sft import NO_GPU, checkpoint_of, interrupted, make_parser, resolved_target, target_of
from .supervise import run


SCRIPT = "trl_qtarget.cli.script"
JOB = "trl_qtarget.cli.job"
# Configurations that are known by name: TRL's, and this package's.
CONFIGS = ("trl.accelerate_configs", "trl_qtarget.cli")


def main(arguments: Sequence[str]) -> int:
    """Launch the training, and wait for it. What ends this process ends the training.

    Returns:
        The exit status of the training; 2 where an argument is wrong; 128 + n where signal n has ended it.

    Raises:
        ValueError: an argument is wrong; nothing has been started.
    """
    checked = check(arguments)
    with one_launch():
        if checked.on_cpu:
            say("sft", NO_GPU)
        status = run(checked.job)
        if status == 128 + signal.SIGINT:
            say("sft", interrupted(checked.output_dir))
    return status


class Checked(NamedTuple):
    """A training whose arguments are right.

    Attributes:
        job: the command that runs it, less its last argument, the pipe of who watches it.
        on_cpu: whether it runs there because there is nothing else.
        output_dir: where it writes.
    """

    job: list[str]
    on_cpu: bool
    output_dir: str


def check(arguments: Sequence[str]) -> Checked:
    """What `trl-qtarget sft` would start.

    Raises:
        ValueError: an argument is wrong.
    """
    arguments = separated(arguments)
    given = names_given(arguments)
    on_cpu = cpu_words(given)
    arguments = [*arguments, *on_cpu]
    parser = make_parser("trl-qtarget sft")
    # Made here only to be checked: a mistake should not cost the start of eight processes.
    parsed = parser.parse_args_and_config(arguments, return_remaining_strings=True, separate_remaining_strings=True)
    script, training, model, mixture, target, reference, going_on, of_config, of_command = parsed
    launcher = launch_command_parser()
    launcher.error = refuse
    options = [*launcher._option_string_actions, "--accelerate_config"]
    check_known([*of_config, *of_command], options, [*options, *parser._option_string_actions])
    config = resolve_config(target_of(arguments, target), training)
    launch_arguments = with_accelerate_config([*of_config, *of_command])
    script_arguments = _without(arguments, of_command)
    # As a module: a script's folder would become the first place where every import looks.
    launched = launcher.parse_args([*launch_arguments, "--module", SCRIPT, *script_arguments])
    if launched.training_script != SCRIPT:
        raise ValueError(f"`{launched.training_script}` belongs to no option: remove it, or put its option before it.")
    if training.use_cpu:
        launch_arguments += _all_cores(launched)
    check_extras(model, reference)
    if _uses_deepspeed(launched, training):
        check_installed("deepspeed", "deepspeed", "deepspeed")
    checkpoint_of(training, resolved_target(config, model, reference), going_on.allow_new_target)
    check_data(script, mixture)
    check_named(model, reference, training.model_init_kwargs)
    job = [sys.executable, "-m", JOB, *launch_arguments, "--module", SCRIPT, *script_arguments]
    return Checked(job, bool(on_cpu), training.output_dir)


def _all_cores(launched: Any) -> list[str]:
    """The option of the launcher by which one process on the CPU has all cores: by itself it gives it a single one."""
    alone = launched.num_processes == 1 or (launched.num_processes is None and not os.path.isfile(default_config_file))
    alone = alone and torch.accelerator.device_count() <= 1  # else the launcher starts a process for each
    if not alone or launched.config_file is not None or launched.num_cpu_threads_per_process is not None:
        return []
    threads = threads_each(1)
    return [] if threads is None else ["--num_cpu_threads_per_process", str(threads)]


def _uses_deepspeed(launched: Any, training: SFTConfig) -> bool:
    """Whether the launch, its configuration's file or the training names DeepSpeed."""
    if launched.use_deepspeed or training.deepspeed:
        return True
    if launched.config_file is None or not os.path.isfile(launched.config_file):
        return False
    values = yaml.safe_load(Path(launched.config_file).read_text(encoding="utf-8"))  # JSON is YAML
    return isinstance(values, dict) and str(values.get("distributed_type", "")).upper() == "DEEPSPEED"


def _without(arguments: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The arguments without those that the launcher takes, which stand among them in the same order."""
    left = list(taken)
    return [item for item in arguments if not (left and item == left[0] and left.pop(0) is not None)]


def with_accelerate_config(arguments: Sequence[str]) -> list[str]:
    """`--accelerate_config NAME` as Accelerate's own `--config_file PATH`.

    Args:
        arguments: options of the launcher; NAME is a file, or one of the configurations that are known.

    Raises:
        ValueError: there is no such file or configuration.
    """
    arguments = [part for item in arguments for part in _split(item)]
    name = None
    while "--accelerate_config" in arguments:  # in a recipe and on the command line, which comes last and wins
        index = arguments.index("--accelerate_config")
        if index + 1 == len(arguments):
            raise ValueError("`--accelerate_config` needs a value: a file, or the name of a configuration.")
        name = arguments[index + 1]
        del arguments[index : index + 2]
    if name is None:
        return arguments
    if os.path.isfile(name):
        path = name
    else:
        files = (file for folder in CONFIGS for file in importlib.resources.files(folder).iterdir())
        known = {file.name[:-5]: file for file in files if file.name.endswith(".yaml")}
        if name not in known:
            hint = suggestion(name, known) or f": choose one of {', '.join(sorted(known))}, or a file."
            raise ValueError(f"`--accelerate_config {name}` is neither a file nor a known configuration{hint}")
        path = known[name]
    return ["--config_file", str(path), *arguments]


def _split(item: str) -> list[str]:
    return item.split("=", 1) if item.startswith("--accelerate_config=") else [item]
