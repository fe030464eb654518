"""What a study ends with: a page in HTML and in Markdown, its figures, and the recommended recipe."""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import TrialState

from ..files import replacing
from ..inspection.figures import pyplot_to_files, save
from .metrics import mean
from .slots import ERROR
from .space import RATE, words
from .study import AGAIN, RETENTION, SCORES, SECONDS, SFT, Study
from .trial import STUDY_ARGUMENTS
from .verdict import LEVEL, Difference, Verdict


KEEP = "No target beat plain SFT beyond chance: keep it."


@dataclass(frozen=True)
class Block:
    """A part of the page: a heading, a paragraph, a table or a figure."""

    kind: str
    text: str = ""
    rows: list[list[str]] = field(default_factory=list)


def write(study: Study) -> str:
    """Write `report.html`, `report.md`, `figures/` and `best.yaml` into the study's folder.

    Returns:
        The verdict, in a sentence or two.
    """
    verdict, folder = study.verdict(), study.plan.folder
    figures = {"gains": _gains(study, verdict), "search": _search(study)}
    for name, figure in figures.items():
        save(figure, folder / "figures" / f"{name}.png")
    pyplot_to_files().close("all")
    blocks = list(_blocks(study, verdict))
    for name, text in (("report.md", _markdown(blocks)), ("report.html", _html(blocks, folder))):
        with replacing(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    with replacing(folder / "best.yaml") as unfinished:
        unfinished.write_text(f"# {sentence(study, verdict)}\n{_best(study, verdict)}", encoding="utf-8")
    return sentence(study, verdict)


def sentence(study: Study, verdict: Verdict) -> str:
    """The verdict in words."""
    metric, sft = study.plan.evaluation.metric.name, _sft(study)
    note = "" if _tuned(study) else " One trial of each method was all the time there was: nothing has been tuned."
    if verdict.winner is None:
        best = max(verdict.judged, key=lambda each: each.difference.value, default=None)
        if best is None:
            return KEEP + note
        return f"{KEEP} (The nearest was {best.name}, {gain(best.difference, metric)} over {sft}.){note}"
    name, params = verdict.winner.name, _params(study, verdict.winner.name)
    won = gain(verdict.winner.difference, metric)
    return f"Take {name} ({words(params)}): {won} over {sft}, beyond chance.{note}"


def _tuned(study: Study) -> bool:
    """Whether any method had more than its first trial, which has the recipe's settings."""
    return any(len(study.search_trials(each.name)) > 1 for each in study.plan.candidates)


def _sft(study: Study) -> str:
    return "tuned sft" if _tuned(study) else "sft"


def gain(difference: Difference, metric: str) -> str:
    """`+0.031 ± 0.009 average_at_k`."""
    return f"{difference.value:+.4f} ± {difference.error:.4f} {metric}"


def _params(study: Study, name: str) -> dict[str, Any]:
    return next(each["params"] for each in study.configurations if each["name"] == name)


def _best(study: Study, verdict: Verdict) -> str:
    """The recommended recipe, on all of the training data, as `trl-qtarget sft --config` takes it."""
    plan, name = study.plan, verdict.winner.name if verdict.winner else SFT
    candidate = next(each for each in plan.candidates if each.name == name)
    left_out = set(STUDY_ARGUMENTS) - {"save_strategy", "save_steps", "save_total_limit", "data_seed"}
    kept = {key: value for key, value in plan.training.recipe.items() if key not in left_out}
    chosen = kept | candidate.options(_params(study, name)) | {"output_dir": str(plan.folder / "final")}
    return yaml.safe_dump(chosen, sort_keys=True, allow_unicode=True)


# --- the page ---


def _blocks(study: Study, verdict: Verdict) -> Iterable[Block]:
    plan, metric = study.plan, study.plan.evaluation.metric
    rows = plan.sets.counts()
    yield Block("title", "What to train toward")
    yield Block("verdict", sentence(study, verdict))
    sign = "; minus the NLL, so that larger is better" if metric.lower_is_better else ""
    yield Block(
        "p",
        f"Metric: {metric.name}{sign}. {rows['train']} rows to train on, {rows['search']} to search on, "
        f"{rows['confirm']} that only the confirmation saw. {_hours(study.spent)} of work.",
    )
    yield Block("h2", "Confirmation")
    yield Block(
        "p",
        f"{len(study.confirmed()[SFT])} fresh trainings of each. The gain is against the mean of both `sft`, prompt "
        f"by prompt, ± one standard error over trainings and prompts; p is one-sided, and beyond chance below "
        f"{verdict.level:.2g} ({LEVEL:g} over all candidates and looks). `{AGAIN}` against `{SFT}` is what chance "
        "alone does.",
    )
    yield Block("table", rows=_confirmation_rows(study, verdict))
    yield Block("figure", "gains")
    yield Block("h2", "Search")
    yield Block(
        "p",
        "The best trial of each method on the search prompts. These scores were chosen for being high: only those of "
        "the confirmation can be believed.",
    )
    yield Block("table", rows=_search_rows(study))
    yield Block("figure", "search")
    yield Block("h2", "Every trial")
    yield Block("table", rows=_trial_rows(study))


def _confirmation_rows(study: Study, verdict: Verdict) -> list[list[str]]:
    judged = {each.name: each for each in verdict.judged}
    header = ["", "settings", "mean score", "of each training", "gain", "p", "verdict", "KL to the base"]
    lines = []
    for name, trials in study.confirmed().items():
        scores = [mean(trial.user_attrs[SCORES]) for trial in trials if SCORES in trial.user_attrs]
        difference = judged[name].difference if name in judged else verdict.control if name == AGAIN else None
        failed = [trial.user_attrs[ERROR] for trial in trials if ERROR in trial.user_attrs]
        outcome = judged[name].outcome.value if name in judged else "control" if name == AGAIN else "baseline"
        kept = [trial.user_attrs[RETENTION] for trial in trials if RETENTION in trial.user_attrs]
        lines.append(
            [
                name,
                words(_params(study, name)),
                f"{mean(scores):.4f}" if scores else "–",
                ", ".join(f"{score:.4f}" for score in scores),
                f"{difference.value:+.4f} ± {difference.error:.4f}" if difference else "",
                f"{difference.p_value:.3g}" if difference and name in judged else "",
                f"failed: {failed[0]}" if failed else outcome,
                f"{mean(kept):.4f}" if kept else "",
            ]
        )
    return _without_empty([header, *lines])


def _without_empty(table: list[list[str]]) -> list[list[str]]:
    kept = [number for number in range(len(table[0])) if number == 0 or any(row[number] for row in table[1:])]
    return [[row[number] for number in kept] for row in table]


def _search_rows(study: Study) -> list[list[str]]:
    header = ["method", "trials", "pruned", "failed", "best score", "settings", "time"]
    lines = []
    for candidate in study.plan.candidates:
        trials, best = study.search_trials(candidate.name), study.best(candidate.name)
        states = [trial.state for trial in trials]
        lines.append(
            [
                candidate.name,
                str(len(trials)),
                str(states.count(TrialState.PRUNED)),
                str(states.count(TrialState.FAIL)),
                f"{best.value:.4f}" if best else "–",
                words(best.params) if best else "",
                _hours(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials)),
            ]
        )
    return [header, *lines]


def _trial_rows(study: Study) -> list[list[str]]:
    header = ["method", "trial", "settings", "on the way", "score", "time", "state"]
    lines = []
    for candidate in study.plan.candidates:
        for place, trial in enumerate(study.search_trials(candidate.name)):
            failed = trial.user_attrs.get(ERROR)
            lines.append(
                [
                    candidate.name,
                    str(place + 1),
                    words(trial.params),
                    ", ".join(f"{value:.4f}" for _, value in sorted(trial.intermediate_values.items())),
                    f"{trial.value:.4f}" if trial.state == TrialState.COMPLETE else "",
                    _hours(trial.user_attrs.get(SECONDS, 0.0)),
                    f"failed: {failed}" if failed else trial.state.name.lower(),
                ]
            )
    return _without_empty([header, *lines])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


# --- figures ---


def _gains(study: Study, verdict: Verdict) -> Any:
    """Gains with two standard errors, and what the second `sft` did."""
    pyplot = pyplot_to_files()
    shown = [(each.name, each.difference) for each in verdict.judged]
    shown += [(AGAIN, verdict.control)] if verdict.control else []
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.5 * len(shown)))
    for line, (name, difference) in enumerate(reversed(shown)):
        colour = "grey" if name == AGAIN else "C2" if verdict.winner and name == verdict.winner.name else "C0"
        axes.errorbar(difference.value, line, xerr=2 * difference.error, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel(f"{study.plan.evaluation.metric.name} minus that of {_sft(study)} (± 2 standard errors)")
    axes.grid(alpha=0.3, axis="x")
    return figure


def _search(study: Study) -> Any:
    """Scores by learning rate, a line per method; crosses were pruned."""
    pyplot = pyplot_to_files()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, candidate in enumerate(study.plan.candidates):
        colour, trials = f"C{number % 10}", study.search_trials(candidate.name)
        whole = sorted((each.params[RATE], each.value) for each in trials if each.state == TrialState.COMPLETE)
        pruned = [
            (each.params[RATE], each.intermediate_values[max(each.intermediate_values)])
            for each in trials
            if each.state == TrialState.PRUNED
        ]
        axes.plot(*(zip(*whole, strict=True) if whole else ([], [])), "o-", color=colour, label=candidate.name)
        axes.plot(*(zip(*pruned, strict=True) if pruned else ([], [])), "x", color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (× pruned on the way)")
    axes.set_ylabel(f"{study.plan.evaluation.metric.name} in the search")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


_CAPTIONS = {
    "gains": "Gains over sft in the confirmation, with two standard errors.",
    "search": "Scores in the search by learning rate.",
}


# --- two forms ---


def _markdown(blocks: list[Block]) -> str:
    parts = []
    for block in blocks:
        if block.kind == "table":
            header, *lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in block.rows]
            rows = [header, ["---"] * len(header), *lines]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        elif block.kind == "figure":
            parts.append(f"![{_CAPTIONS[block.text]}](figures/{block.text}.png)")
        else:
            parts.append({"title": "# ", "h2": "## ", "verdict": "**", "p": ""}[block.kind] + block.text)
            parts[-1] += "**" if block.kind == "verdict" else ""
    return "\n\n".join(parts) + "\n"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fbfaf7; --ink: #1b2330; --soft: #5b6675; --line: #dcdfe4;
  --accent: #0b63a5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #11151b; --ink: #e7ebf0; --soft: #9aa6b5; --line: #2d3642; --accent: #6cb6f0; }}
}}
body {{ margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.6rem; }} h2 {{ margin-top: 2.2rem; font-size: 1.2rem; }}
.verdict {{ padding: .8rem 1rem; border-left: 4px solid var(--accent); font-size: 1.15rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
th {{ color: var(--soft); font-weight: 600; }}
figure {{ margin: 1rem 0; }} figcaption {{ color: var(--soft); font-size: .9rem; }}
img {{ max-width: 100%; background: white; border-radius: .4rem; }}
code {{ font-family: ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }}
</style>
{body}
</html>
"""


def _html(blocks: list[Block], folder: Path) -> str:
    parts = []
    for block in blocks:
        text = _inline(block.text)
        if block.kind == "table":
            header, *lines = [[_inline(cell) for cell in row] for row in block.rows]
            cells = "".join(f'<th scope="col">{cell}</th>' for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in lines)
            parts.append(
                f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>'
            )
        elif block.kind == "figure":
            image = base64.b64encode((folder / "figures" / f"{block.text}.png").read_bytes()).decode()
            caption = html.escape(_CAPTIONS[block.text])
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{image}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        elif block.kind == "verdict":
            parts.append(f'<p class="verdict">{text}</p>')
        else:
            tag = {"title": "h1", "h2": "h2", "p": "p"}[block.kind]
            parts.append(f"<{tag}>{text}</{tag}>")
    return _PAGE.format(title=html.escape(blocks[0].text), body="\n".join(parts))


def _inline(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    pieces = html.escape(text).split("`")
    if len(pieces) % 2 == 0:
        return html.escape(text)
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
