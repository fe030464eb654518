"""The text of `trl-qtarget sft --help`, made beforehand: to collect TRL's arguments takes seconds.

`python -m trl_qtarget.cli.short_help` writes it anew; a test holds it to the parser.
"""

import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..target.config import QTargetConfig
from .sft import ReferenceArguments, RunArguments, make_parser


FILE = Path(__file__).with_name("sft_help.txt")
_EXAMPLE = """\
usage: trl-qtarget sft --model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER [OPTION ...]

Fine-tune a model toward a target. Every argument of `trl sft` is taken too: `--help_all` lists all of them, with those
below. `trl-qtarget methods` explains the methods.

example:
  trl-qtarget sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --method asft --lam 0.05 \\
      --use_peft --learning_rate 1e-4 --max_steps 200 --output_dir out
"""
_OURS = {
    "the target": QTargetConfig,
    "reference model or teacher": ReferenceArguments,
}
_THEIRS = {
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
    "training": (
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
    ),
}
_LAUNCH = {
    "config": "YAML file of arguments by name, those of the launch among them. The command line wins.",
    "accelerate_config": "Launch by this configuration of Accelerate: a file, multi_gpu, zero1, zero2, zero3, fsdp2, "
    "or sequence_parallel, which splits long sequences over the processes.",
    "num_processes": "Processes in all, one for each GPU. Every other option of `accelerate launch` is taken too.",
    "debug": "Show the traceback of an error.",
    "help_all": "All arguments.",
}
# What holds here, where TRL's words say something else.
_OWN_WORDS = {
    "resume_from_checkpoint": "Folder of a checkpoint to go on from; `true` is the last whole one in output_dir.",
    "test_split_size": "Rows to hold out where there is no test split: a share, or a number of rows.",
    "attn_implementation": "Attention: eager, sdpa, flash_attention_2, or a kernel of the hub.",
    "model_name_or_path": "Model to start from: path or hub id.",
    "dataset_name": "Dataset: hub id, folder, or a .json, .jsonl, .parquet, .csv or .arrow file.",
}


def render() -> str:
    """The text, from the parser of `trl-qtarget sft`."""
    actions = make_parser("trl-qtarget sft")._option_string_actions
    sections = [_EXAMPLE]
    for title, kind in _OURS.items():
        names = [item.name for item in fields(kind) if item.name != "_"]
        known = {name: _help(actions[f"--{name}"]) for name in names}
        if kind is QTargetConfig:
            title += " (what is left out has the default of the method: `trl-qtarget methods NAME`)"
        sections.append(_section(title, known))
    sections.append(_section("launch", _LAUNCH))
    for title, names in _THEIRS.items():
        known = {name: _OWN_WORDS.get(name) or _help(actions[f"--{name}"]) for name in names}
        if title == "training":
            known |= {item.name: _help(actions[f"--{item.name}"]) for item in fields(RunArguments)}
        sections.append(_section(title, known))
    return "\n".join(sections)


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
    FILE.write_text(render(), encoding="utf-8")
