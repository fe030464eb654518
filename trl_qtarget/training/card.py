"""What a model card says about the target that a model was trained toward."""

import json
from pathlib import Path

from ..files import replacing
from ..target.config import QTargetConfig


_VERSIONS = "### Framework versions"
_HEADING = "### Training target"


def target_section(config: QTargetConfig, prior: str | None) -> str:
    """The section of a model card, in Markdown: method, formula, prior, configuration and papers."""
    row = config.row
    if row is None:
        what = f"Trust `{config.trust}` with residual `{config.residual}`, a free combination of trl-qtarget."
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
    lines += ["", f"Prior: {prior}."] if prior else []
    lines += ["", "```json", json.dumps(config.to_dict(), indent=2), "```", "", f"Papers: {_papers(config)}."]
    return "\n".join(lines)


def _papers(config: QTargetConfig) -> str:
    names = {"2606.11189": "the target framework"}
    if config.row is not None and config.row.arxiv:
        names = {config.row.arxiv: config.row.source.split(" (")[0]} | names
    return ", ".join(f"[{name} (arXiv {number})](https://arxiv.org/abs/{number})" for number, name in names.items())


def add_target(card: Path, config: QTargetConfig, prior: str | None) -> None:
    """Put the section into a model card of TRL, before the versions; at the end if they are not there."""
    text = card.read_text(encoding="utf-8")
    section = target_section(config, prior)
    before, versions, after = text.partition(_VERSIONS)
    with replacing(card) as whole:
        if versions:
            whole.write_text(f"{before.rstrip()}\n\n{section}\n\n{versions}{after}", encoding="utf-8")
        else:
            whole.write_text(f"{text.rstrip()}\n\n{section}\n", encoding="utf-8")
