"""`trl-qtarget methods`: the published objectives, from the table that the loss itself is made of."""

import argparse
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..target.config import QTargetConfig
from ..target.methods import GROUPS, METHODS, find_method
from ..target.objective import Method, designs_of, knobs_of
from ..target.shown import number
from ..target.values import unit_scale
from .options import refuse, suggestion


def main(arguments: Sequence[str]) -> int:
    """Print the table, or one of its rows in full."""
    parser = argparse.ArgumentParser(prog="trl-qtarget methods", description="List the published objectives.")
    parser.add_argument("name", nargs="?", help="explain this one in full")
    parser.add_argument("--group", choices=list(GROUPS), help="list only those of one group")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown, as the documentation has it")
    parser.add_argument("--json", action="store_true", help="for programs: every fact, as JSON")
    parser.error = refuse
    chosen = parser.parse_args(arguments)
    if chosen.name and chosen.name not in METHODS:
        raise ValueError(
            f"`{chosen.name}` is no method{suggestion(chosen.name, METHODS) or '.'} Known: {', '.join(METHODS)}."
        )
    names = [name for name, row in METHODS.items() if chosen.group in (None, row.group)]
    if chosen.json:
        facts = describe(chosen.name) if chosen.name else [describe(name) for name in names]
        text = json.dumps(facts, indent=2, ensure_ascii=False)
    elif chosen.name:
        text = explain(chosen.name)
    else:
        text = markdown(names) if chosen.markdown else table(names)
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
        "group": row.group,
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
    return ", ".join(f"{knob}={number(default)}" for knob, default in row.knobs.items())


def _grouped(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The groups that have any of these methods, with them."""
    names = list(names)
    for group in GROUPS:
        if members := [name for name in names if METHODS[name].group == group]:
            yield group, members


def table(names: Iterable[str] = METHODS) -> str:
    """One line per method, in columns, by group."""
    heading = ("method", "loss of a token", "knobs", "prior", "arXiv")
    lines = {
        name: (name, row.loss, _knobs(row), row.prior or "", row.arxiv or "")
        for name, row in ((name, METHODS[name]) for name in names)
    }
    # The longest formulas take a line of their own rather than push the columns apart.
    columns = list(zip(heading, *lines.values(), strict=True))
    widths = [max(len(cell) for cell in column if len(cell) <= 36) for column in columns]

    def in_columns(line: tuple[str, ...]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(f"{cell:<{width}}" for cell, width in cells).rstrip()

    texts = [in_columns(heading)]
    for group, members in _grouped(lines):
        texts += ["", f"{group}: {GROUPS[group]}"]
        for name in members:
            line = lines[name]
            if len(line[1]) > widths[1]:
                texts.append(f"{line[0]:<{widths[0]}}  {line[1]}")
                line = ("", "", *line[2:])
            texts.append(in_columns(line))
    texts += [
        "",
        "p: the policy's distribution; y: the label; sg: no gradient; π_prior: the prior (a reference model).",
        "",
    ]
    return "\n".join(texts) + "`trl-qtarget methods NAME` explains one; `--json` prints all."


def markdown(names: Iterable[str] = METHODS) -> str:
    """The same in Markdown, one table per group."""
    texts = []
    for group, members in _grouped(names):
        texts += [
            f"**{group.capitalize()}**: {GROUPS[group]}.",
            "",
            "| method | loss of a token | trust | residual | knobs (default) | prior | source |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in members:
            row = METHODS[name]
            knobs = ", ".join(f"{knob} ({number(default)})" for knob, default in row.knobs.items())
            source = f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else ""
            cells = (f"`{name}`", f"`{row.loss}`", f"`{row.trust}`", f"`{row.residual}`")
            cells = (*cells, knobs, row.prior or "–", source)
            texts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        texts.append("")
    return "\n".join(texts).rstrip()


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
        lines.append(f"knob              {knob} = {number(known['default'])}, {known['range']}")
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
