"""Help: at once, the target's options first, and true to the parser that it stands for."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from accelerate.commands.launch import launch_command_parser

from trl_qtarget import QTargetConfig, cli
from trl_qtarget.cli import short_help
from trl_qtarget.cli.cache import CacheArguments
from trl_qtarget.cli.inspect import InspectArguments
from trl_qtarget.cli.models import ReferenceArguments
from trl_qtarget.cli.sft import RunArguments, make_parser


HELP_AT_ONCE = [["--help"], ["--version"], ["dtf"], *([name, "--help"] for name in cli.SHORT_HELP)]


@pytest.mark.parametrize("words", HELP_AT_ONCE, ids=" ".join)
def test_help_imports_nothing_heavy(words):
    """Half a second is what this takes where torch takes two."""
    code = f"""
import runpy, sys
sys.argv = ["trl-qtarget", *{words!r}]
try:
    runpy.run_module("trl_qtarget", run_name="__main__")
except SystemExit:
    pass
heavy = {{"torch", "transformers", "trl", "accelerate", "datasets", "numpy", "yaml"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_of_training_is_grouped_with_the_target_first(capsys):
    assert cli.main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    groups = [line.partition(" (")[0].rstrip(":") for line in text.splitlines() if re.fullmatch(r"[a-z].*:", line)]
    assert groups == ["example", "the target", "reference model or teacher", "launch", "model", "data", "training"]
    assert "trl-qtarget sft --model_name_or_path" in text
    known = make_parser()._option_string_actions
    launcher = launch_command_parser()._option_string_actions
    named = re.findall(r"^  --(\w+)", text, re.M)
    for name in ("config", "accelerate_config", "num_processes", "debug", "help_all"):
        assert name in named
        named.remove(name)
    assert "--num_processes" in launcher and all(f"--{name}" in known for name in named)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("name", cli.SHORT_HELP)
def test_help_says_of_our_options_what_the_parser_says(name):
    """TRL's words may differ between its versions. `python -m trl_qtarget.cli.short_help` writes the texts."""
    text = " ".join((short_help.FOLDER / cli.SHORT_HELP[name]).read_text(encoding="utf-8").split())
    made = " ".join(short_help.render(name).split())
    assert text.partition(" model: ")[0] == made.partition(" model: ")[0]


OURS = {
    "sft": (QTargetConfig, ReferenceArguments, RunArguments),
    "inspect": (InspectArguments,),
    "cache": (CacheArguments,),
}


@pytest.mark.parametrize("name", OURS)
def test_help_names_all_that_is_ours(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for kind in OURS[name]:
        assert all(f"\n  --{item.name}" in text for item in fields(kind) if item.name != "_")
    assert len(text.splitlines()) < 120 and max(map(len, text.splitlines())) <= 119


def test_all_arguments_are_listed_where_they_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help_all"])
    text = capsys.readouterr().out
    assert "--lam" in text and "--weight_decay" in text
    assert cli.main(["tune", "--help"]) == 0
    assert "--finalists" in capsys.readouterr().out


def test_overview_has_an_example(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert "example:\n  trl-qtarget sft" in text and all(f"\n  {name} " in text for name in cli.COMMANDS)
