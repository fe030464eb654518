"""What the README says is true: its Python blocks run, and its table is `METHODS`."""

import re
from pathlib import Path

import pytest
import tiny
from peft import LoraConfig
from trl import SFTTrainer

from trl_qtarget import METHODS, QTargetSFTTrainer
from trl_qtarget.target.methods import GROUPS
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def clean_shelves():
    kept = [(shelf, dict(shelf)) for shelf in (TRUSTS, RESIDUALS)]
    yield
    for shelf, designs in kept:
        shelf.clear()
        shelf.update(designs)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, clean_shelves):
    exec(compile(block, "README.md", "exec"), {})


def test_readme_has_blocks():
    assert len(BLOCKS) >= 3


def test_diff_is_of_a_script_that_trains_before_and_after(tmp_path):
    """Three lines changed or added beside the import of our own class; with a tiny model in the place of the hub's."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    lines = re.search(r"```diff\n(-from.*?)```", README, re.DOTALL)[1].splitlines()
    for sign, trainer_class in (("-", SFTTrainer), ("+", QTargetSFTTrainer)):
        code = "\n".join(line[1:] for line in lines if line[:1] in (sign, " ", ""))
        code = code.replace("Qwen/Qwen3-1.7B", str(tmp_path / "model")).replace('"out"', repr(str(tmp_path)))
        code = code.replace("packing=True", "packing=True, max_length=32, use_cpu=True, bf16=False, max_steps=1")
        names = {"dataset": tiny.text_dataset(), "LoraConfig": LoraConfig}
        exec(compile(code, "README.md", "exec"), names)
        names["trainer"].train()
        assert type(names["trainer"]) is trainer_class
    added = [line for line in lines if line.startswith("+")]
    assert len(added) == 4 and names["trainer"].qtarget_config.method == "target_sft"


def test_groups_are_those_of_the_methods():
    rows = dict(re.findall(r"^\| ([a-z-]+) \|[^|]*\| ((?:`\w+`(?:, )?)+) \|$", README, re.MULTILINE))
    assert list(rows) == list(GROUPS)
    for group, names in rows.items():
        assert re.findall(r"`(\w+)`", names) == [name for name, row in METHODS.items() if row.group == group]
        assert GROUPS[group] in README


def test_number_of_designs():
    assert f"any of {len(TRUSTS)} trusts goes with any of {len(RESIDUALS)} residuals" in README
