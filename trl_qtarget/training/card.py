"""What a model card says about the target that a model was trained toward."""

import json
import re
from pathlib import Path

from .. import __version__
from ..files import replacing
from ..priors.resolved import ResolvedTarget
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


def target_section(target: ResolvedTarget) -> str:
    """The section of a model card, in Markdown: method, formula, prior, configuration and papers."""
    config = target.config
    row = config.row
    if row is None:
        designs = f"Trust {code(config.trust)} with residual {code(config.residual)}"
        what = f"{designs}, a free combination of trl-qtarget."
    else:
        what = f"`{config.method}` ({row.source}). Loss of a token: `{row.loss}`."
    if target.became_another:
        asked = target.requested
        name = asked.method or f"{asked.trust} + {asked.residual}"
        what += f" Asked for was {code(name)}, which with no other model as its prior is this target."
    lines = [
        _HEADING,
        "",
        f"Trained with trl-qtarget {__version__} toward the target "
        "distribution `Q = γ δ(y) + (1 - γ) π̃` of each token:",
        "",
        what,
    ]
    if target.prior:
        name = f" ({code(target.prior_name)})" if target.prior_name else ""
        lines += ["", f"Prior: {target.prior}{name}."]
    # JSON escapes the ends of lines, so no text in it can begin one and close the block.
    lines += ["", "```json", json.dumps(config.to_dict(), indent=2), "```", "", f"Papers: {_papers(config)}."]
    return "\n".join(lines)


def _papers(config: QTargetConfig) -> str:
    names = {"2606.11189": "the target framework"}
    if config.row is not None and config.row.arxiv:
        names = {config.row.arxiv: config.row.source.split(" (")[0]} | names
    return ", ".join(f"[{name} (arXiv {number})](https://arxiv.org/abs/{number})" for number, name in names.items())


def add_target(card: Path, target: ResolvedTarget) -> None:
    """Put the section into a model card of TRL, before the versions; at the end if they are not there."""
    text = card.read_text(encoding="utf-8")
    section = target_section(target)
    before, versions, after = text.rpartition(_VERSIONS)
    with replacing(card) as whole:
        if versions:
            whole.write_text(f"{before.rstrip()}\n\n{section}\n{versions}{after}", encoding="utf-8")
        else:
            whole.write_text(f"{text.rstrip()}\n\n{section}\n", encoding="utf-8")


def add_names(card: Path, folder: str, base: str | None) -> None:
    """Put names where TRL's card, which knows those of the hub alone, says `None`.

    Args:
        card: the model card.
        folder: where the model lies; only its last part is written.
        base: what the model that was trained is called, if it is called anything.
    """
    name = Path(folder).resolve().name
    name = name if re.fullmatch(r"[\w.-]+", name) else "model"
    # The base's name last, for it might hold one of the others.
    names = {
        "\n# Model Card for None\n": f"\n# Model Card for {name}\n",
        'pipeline("text-generation", model="None"': f'pipeline("text-generation", model="{name}"',
        "[None](https://huggingface.co/None)": code(base) if base else "a model without a name",
    }
    text = card.read_text(encoding="utf-8")
    for none, known in names.items():
        text = text.replace(none, known, 1)
    with replacing(card) as whole:
        whole.write_text(text, encoding="utf-8")
