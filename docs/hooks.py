"""What the pages take from the code and the results instead of repeating it."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from trl_qtarget import METHODS
from trl_qtarget.cli.methods import describe


ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "method_comparison"


def methods_table() -> str:
    """The table of methods, in Markdown, from `METHODS`."""
    lines = [
        "| method | loss of a token | trust | residual | knobs (default) | prior | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in METHODS.items():
        facts = describe(name)
        knobs = ", ".join(f"{knob} ({known['default']:g})" for knob, known in facts["knobs"].items())
        source = f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else ""
        cells = (f"`{name}`", f"`{row.loss}`", f"`{row.trust}`", f"`{row.residual}`", knobs, row.prior or "–", source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """The page of the comparison and its figures, where its results are."""
    page = COMPARISON / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# The comparison\n\nNot run yet."
    text = text.replace("[results](results)", "`method_comparison/results`")
    files.append(File.generated(config, "comparison.md", content=text))
    for figure in (COMPARISON / "figures").glob("*.png"):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the marks, and leave of links to files outside the documentation only their text."""
    outside = re.escape("../" * (page.file.src_uri.count("/") + 1))
    markdown = re.sub(rf"\[([^\]]+)\]\({outside}(?!\.\./)[^)]+\)", r"\1", markdown)
    return markdown.replace("<!-- methods-table -->", methods_table())
