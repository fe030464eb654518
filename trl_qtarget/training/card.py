"""What a model card says about the target that a model was trained toward."""

import json
import re
from pathlib import Path

from ..files import replacing
from ..target.config import QTargetConfig


_VERSIONS = "\n### Framework versions\n"
_HEADING = "### Training target"


def code(text: str) -> str:
    """Any text as one span of code in Markdown: it stays there, on its line, and means nothing but itself."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    # Renderers take one space from each end of a span, unless it is all spaces.
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line or '?'}{pad}{fence}"


def target_section(config: QTargetConfig, prior: str | None, reference_name: str | None = None) -> str:
    """The section of a model card, in Markdown: method, formula, prior, configuration and papers.

    Args:
        config: the target.
        prior: what the prior is, in words of this package; None if there is none.
        reference_name: what the reference model is called, by whoever named it.
    """
    row = config.row
    if row is None:
        designs = f"Trust {code(config.trust)} with residual {code(config.residual)}"
        what = f"{designs}, a free combination of trl-qtarget."
    else:
        what = f"`{config.method}` ({row.source}). Loss of a token: `{row.loss}`."
    lines = [
        _HEADING,
        "",
        "Trained with [trl-qtarget](https://pypi.org/project/trl-qtarget/) toward the target distribution "
        "`Q = γ δ(y) + (1 - γ) π̃` of each token:",
        "",
        what,
    ]
    if prior:
        lines += ["", f"Prior: {prior} ({code(reference_name)})." if reference_name else f"Prior: {prior}."]
    # JSON escapes the ends of lines, so no text in it can begin one and close the block.
    lines += ["", "```json", json.dumps(config.to_dict(), indent=2), "```", "", f"Papers: {_papers(config)}."]
    return "\n".join(lines)


def _papers(config: QTargetConfig) -> str:
    names = {"2606.11189": "the target framework"}
    if config.row is not None and config.row.arxiv:
        names = {config.row.arxiv: config.row.source.split(" (")[0]} | names
    return ", ".join(f"[{name} (arXiv {number})](https://arxiv.org/abs/{number})" for number, name in names.items())


def add_target(card: Path, config: QTargetConfig, prior: str | None, reference_name: str | None = None) -> None:
    """Put the section into a model card of TRL, before the versions; at the end if they are not there."""
    text = card.read_text(encoding="utf-8")
    section = target_section(config, prior, reference_name)
    before, versions, after = text.rpartition(_VERSIONS)
    with replacing(card) as whole:
        if versions:
            whole.write_text(f"{before.rstrip()}\n\n{section}\n{versions}{after}", encoding="utf-8")
        else:
            whole.write_text(f"{text.rstrip()}\n\n{section}\n", encoding="utf-8")
