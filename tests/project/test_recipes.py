"""Every recipe under examples/ is read by the command line, and those of one machine train, with tiny models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from launch import environment
from thinned import thinned
from training import warm_model

from trl_qtarget import QTargetConfig
from trl_qtarget.cli.launch import main as launch
from trl_qtarget.cli.sft import make_parser


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").rglob("*.yaml"))
PAPER = [recipe for recipe in RECIPES if recipe.parent.name == "paper"]
# What keeps the GPU's options away from a CPU.
ON_CPU = {"use_cpu": True, "bf16": False, "dtype": "float32", "report_to": "none", "max_steps": 2}


def _recipe_id(recipe: Path) -> str:
    return recipe.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=_recipe_id)
def test_recipe_names_only_what_exists(recipe):
    *parsed, left = make_parser().parse_args_and_config(
        ["--config", str(recipe), "--use_cpu", "--bf16", "False"], return_remaining_strings=True
    )
    target = next(part for part in parsed if isinstance(part, QTargetConfig))
    assert left == []
    assert target.method == yaml.safe_load(recipe.read_text())["method"]
    # The command that its comment gives is one of its own name.
    assert re.search(rf"trl-qtarget sft --config {re.escape(recipe.name)}", recipe.read_text())


def test_paper_has_ten_settings_whose_lines_say_whose_they_are(tmp_path):
    assert len(PAPER) == 10
    for recipe in PAPER:
        text = recipe.read_text()
        for line, mark in (
            ("model_name_or_path", "paper"),
            ("method", "paper"),
            ("eta", "ours"),
            ("ref_model", "ours"),
        ):
            assert re.search(rf"^{line}.*# {mark}", text, re.MULTILINE), f"{recipe.name}: {line}"


def test_paper_recipes_are_what_their_script_writes(tmp_path):
    script = (EXAMPLES / "recipes" / "paper" / "make.py").read_text()
    (tmp_path / "make.py").write_text(script)
    subprocess.run([sys.executable, str(tmp_path / "make.py")], check=True)
    assert {file.name: file.read_text() for file in tmp_path.glob("*.yaml")} == {
        file.name: file.read_text() for file in PAPER
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy and a teacher, and chats of several datasets' formats."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, steps in (("policy", 20), ("teacher", 30)):
        warm_model(steps=steps).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    tiny.chat_dataset().to_json(str(folder / "chats.jsonl"))
    rows = [{"text": text, "prompt": text[:5]} for text in tiny.sentences(24)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# QLoRA's NF4 on a CPU wants wider models, and test_qlora.py trains it; ZeRO-3 takes processes (test_cli.py).
TRAINED = [
    recipe for recipe in RECIPES if recipe.stem in ("drop_in", "full_zero3", "numina_qwen3-1.7b", "medical_qwen2.5-7b")
]

_QUICK = ()  # each takes a training of its own; all of them are checked without one


@pytest.mark.parametrize("recipe", thinned(TRAINED, lambda recipe: recipe.stem in _QUICK), ids=_recipe_id)
def test_recipe_trains(recipe, folder, tmp_path, monkeypatch):
    """As it stands, but for the model, the data, and a CPU."""
    values = yaml.safe_load(recipe.read_text()) | ON_CPU
    values |= {"model_name_or_path": str(folder / "policy"), "output_dir": str(tmp_path / "out")}
    if "ref_model_name_or_path" in values:
        values["ref_model_name_or_path"] = str(folder / "teacher")
    for each in values.get("datasets", []):
        each["path"] = str(folder / ("texts.jsonl" if each["columns"] == ["text"] else "chats.jsonl"))
        each["split"] = "train"
    if "dataset_name" in values:
        values["dataset_name"] = str(folder / "chats.jsonl")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    assert launch(["--config", str(file)]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "qtarget_config.json").is_file()


def test_own_objective_trains(folder, tmp_path):
    command = [sys.executable, str(EXAMPLES / "own_objective.py"), "--use_cpu", "--max_steps", "2"]
    command += ["--model", str(folder / "policy"), "--dataset", str(folder / "chats.jsonl")]
    done = subprocess.run([*command, "--output_dir", str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "qtarget_config.json").read_text())["trust"] == "relative"
