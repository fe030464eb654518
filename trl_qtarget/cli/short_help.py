"""The texts of `--help` of the commands that take TRL's arguments, made beforehand: to collect these takes seconds.

`python -m trl_qtarget.cli.short_help` writes them anew; a test holds them to the parsers.
"""

import re
import textwrap
from argparse import ArgumentParser
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..target.config import QTargetConfig
from . import SHORT_HELP
from .cache import CacheArguments
from .inspect import InspectArguments
from .models import ReferenceArguments
from .recipe import Parser
from .sft import RECIPE, RunArguments, make_parser
from .tune import make_parser as make_tune_parser


FOLDER = Path(__file__).parent

_SFT = """\
usage: trl-qtarget sft --model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER [OPTION ...]

Fine-tune a model toward a target. Every argument of `trl sft` is taken too: `--help_all` lists all of them, with those
below. `trl-qtarget methods` explains the methods.

example:
  trl-qtarget sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --method asft --lam 0.05 \\
      --use_peft --learning_rate 1e-4 --max_steps 200 --output_dir out
"""
_INSPECT = """\
usage: trl-qtarget inspect --model_name_or_path MODEL --dataset_name DATASET [OPTION ...]

Write a page that shows, token by token on your own examples, what each method would teach. Nothing is trained. Every
argument of `trl-qtarget sft` is taken too, so that a training's recipe can be inspected: `--help_all` lists all.

example:
  trl-qtarget inspect --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
      --methods sft dft asft:lam=0.05 --examples 20 --output inspection.html
"""
_CACHE = """\
usage: trl-qtarget cache --model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER [OPTION ...]

Run a teacher, or the base, once over a dataset, and keep what it says of every label. Trainings read it by
`trl-qtarget sft --prior_cache FOLDER`. Every argument of `trl-qtarget sft` is taken too: `--help_all` lists all. The
same command goes on with a cache that is not whole.

example:
  trl-qtarget cache --model_name_or_path Qwen/Qwen3-0.6B --ref_model_name_or_path Qwen/Qwen3-8B --ref_load_in_4bit \\
      --dataset_name trl-lib/Capybara --form top_k --k 64 --output_dir cache
"""
_TUNE = """\
usage: trl-qtarget tune --config RECIPE --methods METHOD [METHOD ...] --output_dir FOLDER [OPTION ...]

Train toward several targets, each tuned with the same number of trials, confirm the best beside plain SFT with fresh
seeds on prompts that the search never saw, and say which to take. Every argument of `trl-qtarget sft` is taken too
(`trl-qtarget sft --help`), and a recipe may hold those below. The same command goes on with an interrupted study.

example:
  trl-qtarget tune --config recipe.yaml --methods dft asft target_sft --problems problems.jsonl --budget 6h \\
      --output_dir study
"""

_TARGET = "the target (what is left out has the default of the method: `trl-qtarget methods NAME`)"
_REFERENCE = "reference model or teacher"
_DEBUG = {"debug": "Show the traceback of an error.", "help_all": "All arguments."}
_RECIPE_FILE = "YAML file of arguments by name. The command line wins."
_LAUNCH = {
    "config": "YAML file of arguments by name, those of the launch among them. The command line wins.",
    "accelerate_config": "Launch by this configuration of Accelerate: a file, multi_gpu, zero1, zero2, zero3, fsdp2, "
    "or sequence_parallel, which splits long sequences over the processes.",
    "num_processes": "Processes in all, one for each GPU. Every other option of `accelerate launch` is taken too.",
    **_DEBUG,
}
_DATA = ("dataset_name", "dataset_train_split", "max_length", "completion_only_loss", "assistant_only_loss")
_TRAINING = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "eval_strategy",
    "logging_steps",
    "save_steps",
    "report_to",
    "seed",
    "use_cpu",
    "resume_from_checkpoint",
)
# What holds here, where TRL's words say something else.
_OWN_WORDS = {
    "resume_from_checkpoint": "Folder of a checkpoint to go on from; `true` is the last whole one in output_dir.",
    "test_split_size": "Rows to hold out where there is no test split: a share, or a number of rows.",
    "attn_implementation": "Attention: eager, sdpa, flash_attention_2, or a kernel of the hub.",
    "model_name_or_path": "Model to start from: path or hub id.",
    "dataset_name": "Dataset: hub id, folder, or a .json, .jsonl, .parquet, .csv or .arrow file.",
}


@dataclass(frozen=True)
class _Page:
    """A text of `--help`.

    Attributes:
        opening: usage, what the command does, and an example.
        parser: of the command.
        sections: by title; names of arguments, classes of them, or arguments with their text.
        own_words: of arguments that mean something else here than in a training.
    """

    opening: str
    parser: ArgumentParser
    sections: dict[str, tuple[Any, ...]]
    own_words: dict[str, str]


@cache
def _pages() -> dict[str, _Page]:
    teacher = [name for name in _names(ReferenceArguments) if name != "prior_cache"]
    sft = _Page(
        _SFT,
        make_parser("trl-qtarget sft"),
        {
            _TARGET: (QTargetConfig,),
            _REFERENCE: (ReferenceArguments,),
            "launch": (_LAUNCH,),
            "model": ("model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r", "load_in_4bit"),
            "data": (
                "dataset_name",
                "dataset_train_split",
                "dataset_test_split",
                "test_split_size",
                "dataset_streaming",
                "max_length",
                "packing",
                "completion_only_loss",
                "assistant_only_loss",
            ),
            "training": (*_TRAINING, RunArguments),
        },
        _OWN_WORDS,
    )
    inspect = _Page(
        _INSPECT,
        Parser((InspectArguments, *RECIPE), prog="trl-qtarget inspect"),
        {
            "the page": (InspectArguments,),
            "the target, where `--methods` is not given (its knobs: `trl-qtarget sft --help`)": ("method",),
            _REFERENCE: (teacher,),
            "recipe": ({"config": _RECIPE_FILE} | _DEBUG,),
            "model": ("model_name_or_path", "dtype", "attn_implementation", "load_in_4bit"),
            "data": _DATA,
        },
        _OWN_WORDS | {"model_name_or_path": "Model to inspect, adapters too: path or hub id."},
    )
    caching = _Page(
        _CACHE,
        Parser((CacheArguments, *RECIPE), prog="trl-qtarget cache"),
        {
            "the cache": ({"output_dir": "Its folder, which is another one than the training's."}, CacheArguments),
            "the teacher (none: the base under adapters with `--use_peft`, else the model as it is)": (teacher,),
            "recipe": ({"config": _RECIPE_FILE} | _DEBUG,),
            "model": ("model_name_or_path", "dtype", "attn_implementation", "use_peft", "load_in_4bit"),
            "data": (*_DATA, "packing", "per_device_eval_batch_size", "use_cpu"),
        },
        _OWN_WORDS
        | {
            "model_name_or_path": "Model that will be trained, for its tokens; it runs where there is no teacher.",
            "max_length": "As in the training: what it, or packing, cuts off there is not kept.",
            "packing": "As in the training.",
            "per_device_eval_batch_size": "Examples read at a time.",
            "use_cpu": "Run on the CPU, which happens by itself where there is no GPU.",
        },
    )
    parser = make_tune_parser()
    own = [action.dest for action in parser._actions if action.dest != "help"]
    tune = _Page(
        _TUNE, parser, {"the study": (own,), "recipe": ({"config": _RECIPE_FILE} | {"debug": _DEBUG["debug"]},)}, {}
    )
    return {"sft": sft, "inspect": inspect, "cache": caching, "tune": tune}


def render(command: str) -> str:
    """The text of a command, from its parser."""
    page = _pages()[command]
    return "\n".join([page.opening, *(_section(title, _known(page, what)) for title, what in page.sections.items())])


def _known(page: _Page, what: tuple[Any, ...]) -> dict[str, str]:
    """The arguments of a section with their texts."""
    actions, known = page.parser._option_string_actions, {}
    for item in what:
        if isinstance(item, dict):
            known |= item
            continue
        names = [item] if isinstance(item, str) else item if isinstance(item, list) else _names(item)
        known |= {name: page.own_words.get(name) or _help(actions[f"--{name}"]) for name in names}
    return known


def _names(kind: type) -> list[str]:
    return [item.name for item in fields(kind) if item.name != "_"]


def _help(action: Any) -> str:
    """The first sentences of its help, in plain words, and its default."""
    text = " ".join(re.sub(r"``?", "", action.help or "").split()).replace("%%", "%")
    text = text.replace("(default: %(default)s)", "").strip()
    text = text.removesuffix(" None takes the default of the method or design.")
    sentences = re.split(r"(?<=\.) (?=[A-Z])", text)
    short = text if len(text) <= 240 else sentences[0]
    default = action.default
    if default in (None, "", False) or isinstance(default, list | dict) or "None:" in short:
        return short
    return f"{short} [{default}]"


def _section(title: str, known: dict[str, str]) -> str:
    lines = [f"{title}:"]
    for name, text in known.items():
        parts = textwrap.wrap(text, 84, break_on_hyphens=False) or [""]
        head = f"  --{name}"
        if len(head) > 31:
            lines.append(head)
            head = ""
        lines.append(f"{head:<33}{parts[0]}".rstrip())
        lines += [" " * 33 + part for part in parts[1:]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, file in SHORT_HELP.items():
        (FOLDER / file).write_text(render(name), encoding="utf-8")
