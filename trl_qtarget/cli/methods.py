"""`trl-qtarget methods`: the published objectives, from the table that the loss itself is made of."""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..target.config import QTargetConfig
from ..target.methods import METHODS, find_method
from ..target.objective import Method, designs_of, knobs_of
from ..target.values import unit_scale
from .options import suggestion


def main(arguments: Sequence[str]) -> int:
    """Print the table, or one of its rows in full."""
    parser = argparse.ArgumentParser(prog="trl-qtarget methods", description="List the published objectives.")
    parser.add_argument("name", nargs="?", help="explain this one in full")
    parser.add_argument("--json", action="store_true", help="for programs: every fact, as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.name and chosen.name not in METHODS:
        raise ValueError(
            f"`{chosen.name}` is no method{suggestion(chosen.name, METHODS)} Known: {', '.join(METHODS)}."
        )
    if chosen.json:
        facts = describe(chosen.name) if chosen.name else [describe(name) for name in METHODS]
        text = json.dumps(facts, indent=2, ensure_ascii=False)
    else:
        text = explain(chosen.name) if chosen.name else table()
    sys.stdout.write(text + "\n")
    return 0


def _first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "").split("\n", 1)[0].rstrip(".")


def describe(name: str) -> dict[str, Any]:
    """Everything that is known of a method, in plain values.

    Raises:
        ValueError: no such method.
    """
    row = find_method(name)
    designs = designs_of(row, None, None)
    trust, residual, _ = designs
    knobs = knobs_of(row, designs)
    return {
        "method": name,
        "loss": row.loss,
        "trust": {"name": row.trust, "formula": trust.summary.rstrip(".")},
        "residual": {"name": row.residual, "formula": residual.summary.rstrip(".")},
        "scale": _first_line(row.scale),
        "knobs": {knob: {"default": knobs[knob].default, "range": str(knobs[knob].range)} for knob in knobs},
        "prior": row.prior,
        "prior_sync_steps": row.prior_sync_steps,
        "needs_token_weights": QTargetConfig(name).uses_token_weights,
        "source": row.source,
        "arxiv": row.arxiv,
    }


def _knobs(row: Method) -> str:
    return ", ".join(f"{knob}={default:g}" for knob, default in row.knobs.items())


def table() -> str:
    """One line per method, in columns."""
    lines = [("method", "loss of a token", "knobs", "prior", "arXiv")]
    for name, row in METHODS.items():
        lines.append((name, row.loss, _knobs(row), row.prior or "", row.arxiv or ""))
    # The longest formula takes a line of its own rather than push the columns apart.
    widths = [max(len(line[column]) for line in lines if len(line[column]) <= 48) for column in range(5)]
    texts = []
    for line in lines:
        if len(line[1]) > widths[1]:
            texts.append(f"{line[0]:<{widths[0]}}  {line[1]}")
            line = ("", "", *line[2:])
        texts.append("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    texts += [
        "",
        "p: the policy's distribution; y: the label; sg: no gradient; π_prior: the prior (a reference model).",
        "",
    ]
    return "\n".join(texts) + "`trl-qtarget methods NAME` explains one; `--json` prints all."


def explain(name: str) -> str:
    """All of one method, as text."""
    facts, row = describe(name), METHODS[name]
    lines = [f"{name}: {facts['source']}" + (f" (arXiv {row.arxiv})" if row.arxiv else ""), ""]
    lines.append(f"loss of a token   {facts['loss']}")
    lines.append("gradient          s (p - Q) with respect to the logits, Q = γ δ(y) + (1 - γ) π̃")
    lines.append(f"trust             {facts['trust']['formula']}  [{row.trust}]")
    lines.append(f"residual          {facts['residual']['formula']}  [{row.residual}]")
    if row.scale is not unit_scale:
        lines.append(f"scale             {facts['scale']}")
    for knob, known in facts["knobs"].items():
        lines.append(f"knob              {knob} = {known['default']:g}, {known['range']}")
    if row.prior:
        every = f", copied every {row.prior_sync_steps} optimiser steps" if row.prior_sync_steps else ""
        lines.append(f"prior             {_PRIORS[row.prior]}{every}")
    if facts["needs_token_weights"]:
        lines.append("dataset           needs a column with one weight per token (`--token_weight_column`)")
    lines += ["", f"trl-qtarget sft --method {name} ...", f'QTargetSFTTrainer(..., qtarget_config="{name}")']
    return "\n".join(lines)


_PRIORS = {
    "auto": "a reference model if given, else the base weights under the adapters, else the policy itself",
    "base": "the starting weights (under the adapters, or a frozen copy), or a given reference model",
    "model": "a reference model (teacher), which has to be given",
    "lagged": "an earlier state of the policy",
}
