"""What the pages take from the results instead of repeating it."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "method_comparison"
REAL = COMPARISON / "real"


def on_files(files: Any, config: Any) -> Any:
    """The pages of the comparison and their figures, where its results are."""
    for name, page in (("comparison.md", COMPARISON / "README.md"), ("comparison_real.md", REAL / "README.md")):
        text = page.read_text(encoding="utf-8") if page.is_file() else "# The comparison\n\nNot run yet."
        text = text.replace("[results](results)", "`method_comparison/results`")
        text = text.replace("](real/README.md)", "](comparison_real.md)").replace(
            "](../README.md)", "](comparison.md)"
        )
        files.append(File.generated(config, name, content=text))
    for figure in [*(COMPARISON / "figures").glob("*.png"), *(REAL / "figures").glob("*.png")]:
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leave of links to files outside the documentation only their text."""
    outside = re.escape("../" * (page.file.src_uri.count("/") + 1))
    return re.sub(rf"\[([^\]]+)\]\({outside}(?!\.\./)[^)]+\)", r"\1", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves: no script, and no request to another site."""
    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', _drawn, content, flags=re.DOTALL)


def _drawn(found: re.Match) -> str:
    block = found[1] == "div"
    formula = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f"<p>{formula}</p>" if block else formula
