"""What the README says is true: its Python blocks run, and its table is `METHODS`."""

import re
from pathlib import Path

import pytest

from trl_qtarget import METHODS
from trl_qtarget.registry import Shelf
from trl_qtarget.residual import RESIDUALS
from trl_qtarget.trust import TRUSTS


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
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


def test_methods_table_is_methods():
    rows = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", README, re.MULTILINE)[1:]  # without the heading
    assert [name for name, _ in rows] == list(METHODS)
    for name, cells in rows:
        method = METHODS[name]
        for knob, default in method.knobs.items():
            assert re.search(rf"\b{knob} \({re.escape(str(default))}", cells), f"{name}: {knob}={default}"
        assert (method.arxiv or "") in cells
        assert f"| {method.prior or '–'} |" in cells


@pytest.mark.parametrize("shelf", [TRUSTS, RESIDUALS], ids=lambda shelf: shelf.kind)
def test_every_design_is_named(shelf: Shelf):
    for name in shelf:
        assert f"`{name}`" in README
