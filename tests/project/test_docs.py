"""The documentation: its Python runs, its pages are all reachable, and its table is `METHODS`."""

import re
from pathlib import Path

import pytest
import yaml

from trl_qtarget import METHODS
from trl_qtarget.cli.methods import markdown
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCKS = [
    pytest.param(block, page, id=f"{page.relative_to(DOCS)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.fixture
def clean_shelves():
    kept = [(shelf, dict(shelf)) for shelf in (TRUSTS, RESIDUALS)]
    yield
    for shelf, designs in kept:
        shelf.clear()
        shelf.update(designs)


@pytest.mark.parametrize(("block", "page"), BLOCKS)
def test_python_blocks_run(block, page, clean_shelves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": "__main__"})


def test_printed_lines_of_the_first_page_are_what_is_printed(capsys):
    """The comments under its loop."""
    block = re.search(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)[1]
    exec(compile(block, "index.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [line[2:] for line in block.splitlines() if line.startswith("# ")]


def _pages_of(navigation) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in _pages_of(part)]


def test_every_page_is_in_the_navigation():
    # The file has no Python tags that a safe loader would not know.
    navigation = _pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    found = {str(page.relative_to(DOCS)) for page in PAGES}
    assert set(navigation) == found | {"comparison.md", "comparison_real.md"}, "they come from results"
    assert len(navigation) == len(set(navigation))


def test_methods_table_is_made_from_the_methods():
    page = (DOCS / "methods" / "index.md").read_text()
    written = page.split("<!-- methods-table: written by `trl-qtarget methods --markdown` -->")[1]
    assert written.split("<!-- end of methods-table -->")[0].strip() == markdown()
    lines = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(lines) == len(METHODS)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in lines), "a bar within a cell is escaped"


def test_every_method_has_its_section():
    pages = "".join(page.read_text() for page in (DOCS / "methods").glob("*.md"))
    headings = " ".join(re.findall(r"^##+ .*$", pages, re.MULTILINE)) + " `target_sft`"
    assert [name for name in METHODS if f"`{name}`" not in headings] == []


@pytest.mark.parametrize("shelf", [TRUSTS, RESIDUALS], ids=lambda shelf: shelf.kind)
def test_every_design_is_named(shelf):
    page = (DOCS / "methods" / "free.md").read_text()
    assert [name for name in shelf if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
