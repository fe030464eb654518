"""The prose of a page: marks `{{...}}` that become what the results say, and lines of one width afterwards."""

import re
import textwrap
from collections.abc import Callable


_WIDTH = 119
_TABLE_OR_HEADING = ("#", "|", "<", "!")


def filled(text: str, value: Callable[[str], str]) -> str:
    """A text with each mark replaced by its value; a mark may go over several lines."""
    return re.sub(r"\{\{(.+?)\}\}", lambda found: value(" ".join(found[1].split())), text, flags=re.DOTALL)


def wrapped(text: str) -> str:
    """Paragraphs and items of lists in lines of one width, whatever the marks in them became."""
    blocks = re.split(r"\n{2,}", text.strip("\n"))
    return "\n\n".join(each if each.startswith(_TABLE_OR_HEADING) else _lines(each) for each in blocks) + "\n"


def _lines(block: str) -> str:
    """A paragraph, or a list: its items, the lines of each indented below its first."""
    lines = []
    for item in re.split(r"\n(?=- |\d+\. )", block):
        bullet = re.match(r"- |\d+\. |", item)[0]
        words = " ".join(item.split())
        indent = " " * len(bullet)
        lines += textwrap.wrap(words, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
