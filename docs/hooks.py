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
# Pages of the site, and what they are made of.
PAGES = {"comparison.md": "method_comparison/README.md", "comparison_real.md": "method_comparison/real/README.md"}


def on_files(files: Any, config: Any) -> Any:
    """The pages of the comparison and their figures, where its results are."""
    for name, source in PAGES.items():
        page = ROOT / source
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
    """Lead links to the comparison to its page, and leave of those to other files outside only their text."""
    depth = page.file.src_uri.count("/")
    for name, source in PAGES.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{source})", f"]({'../' * depth}{name})")
    outside = re.escape("../" * (depth + 1))
    return re.sub(rf"\[([^\]]+)\]\({outside}(?!\.\./)[^)]+\)", r"\1", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves: no script, and no request to another site."""
    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', _drawn, content, flags=re.DOTALL)


def _drawn(found: re.Match) -> str:
    block = found[1] == "div"
    formula = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f"<p>{formula}</p>" if block else formula
