"""`trl-qtarget recipes`: what came with the package, listed and copied, and nothing written over."""

from pathlib import Path

import pytest

from trl_qtarget.cli import main


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_lists_each_with_what_it_says_of_itself(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("recipes/qlora_24gb.yaml"))
    assert "QLoRA of an 8B model" in line
    assert all("  " in line for line in lines[:-2]), "each has a title"


def test_copies_a_file_or_a_folder(tmp_path, capsys):
    assert main(["recipes", "drop_in", "recipes/paper", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "drop_in.yaml").read_bytes() == (EXAMPLES / "recipes" / "drop_in.yaml").read_bytes()
    assert len(list((tmp_path / "paper").glob("*.yaml"))) == 10
    assert main(["recipes", "drop_in", "--output", str(tmp_path)]) == 2
    assert "drop_in.yaml is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("drop_inn", "did you mean `drop_in`?"), ("train.yaml", "is no recipe"), ("fsdp", "`fsdp2`")],
)
def test_unknown_names(name, message, capsys):
    assert main(["recipes", name]) == 2
    assert message in capsys.readouterr().err
