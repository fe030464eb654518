"""The collected data as one HTML page that asks nothing of the network."""

import base64
import hashlib
import importlib.resources
import json
import math
import re
import struct
from pathlib import Path

from ..files import replacing


def render(data: dict) -> str:
    """The whole page.

    Args:
        data: what the page shows, of JSON's types. Its texts may be hostile: none is ever read as markup or script.

    Returns:
        HTML without surrogates, which UTF-8 can write.

    Raises:
        ValueError: a number is NaN or infinite, which a page cannot hold.
    """
    style = _ours("page.css")
    script = "".join(map(_ours, ("parts.js", "suspicious.js", "page.js")))
    parts = {"policy": _policy(style, script), "style": style, "script": script, "data": _inert(_packed(data))}
    # In one pass, so that a text which looks like one of our marks stays a text.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _ours("page.html"))


def write_page(data: dict, path: "str | Path") -> None:
    """Write the page of `data`, which `inspect_target` returned, to `path`, whole or not at all."""
    page = render(data)
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(page, encoding="utf-8", newline="\n")


def _ours(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _packed(data: dict) -> dict:
    """The data with the probabilities in base64: they are most of a page, and half as long so as in decimals."""
    examples = [
        example
        | {name: _floats(example[name]) for name in ("p", "prior")}
        | {"methods": [method | {"q": _floats(method["q"])} for method in example["methods"]]}
        for example in data["examples"]
    ]
    return data | {"examples": examples}


def _floats(rows: list[list[float]] | None) -> str | None:
    """Rows one after the other as little-endian float32, which tells more digits apart than the data have."""
    if rows is None:
        return None
    values = [value for row in rows for value in row]
    if not all(map(math.isfinite, values)):
        raise ValueError("A probability is NaN or infinite, and cannot be shown.")
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _inert(data: dict) -> str:
    """JSON in printable ASCII and without markup: nothing in it can end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub(r"[<>&\x7f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, sent or run but our own two blocks, and no string may become markup."""
    return (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _sha256(block: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
