"""The page: a template whose marks `{{...}}` are filled with tables and figures of the results."""

import re
from pathlib import Path

from trl_qtarget.files import replacing

from . import figures, tables
from .settings import HERE, Study
from .store import Store


# The page of a rerun: all tables, without the words that were written about other results.
PLAIN = """# Comparison of methods

{{facts}}

Differences are in percentage points, paired by prompt, ± one standard error; bold beyond two. † the best learning rate
or knob lies on an edge of what was tried.

## Models

{{models}}

## Difference to plain SFT

{{wins:sft}}

{{differences:sft:best T}}

{{figure:differences}}

## Learning rates and knobs

{{rates}}

{{knobs}}

{{figure:rates}}

## Settings

{{settings}}
"""


def write(study: Study, store: Store, directory: Path, template: Path | None = None) -> Path:
    """Write README.md and its figures into a folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: the template has a mark that is unknown.
    """
    text = template.read_text(encoding="utf-8") if template else PLAIN
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "README.md"
    filled = re.sub(r"\{\{(.+?)\}\}", lambda found: _fill(found[1], study, store, directory), text)
    with replacing(path) as whole:
        whole.write_text(filled, encoding="utf-8")
    return path


def _fill(mark: str, study: Study, store: Store, directory: Path) -> str:
    name, *options = mark.split(":")
    if name == "figure":
        return f"![{options[0]}]({figures.draw(options[0], study, store, directory).relative_to(directory)})"
    if name == "setting":
        return tables.setting_table(next(s for s in study.settings if s.name == options[0]), study, store)
    makers = {
        "facts": facts,
        "models": tables.models_table,
        "wins": tables.wins_table,
        "differences": tables.difference_table,
        "rates": tables.rates_table,
        "knobs": tables.knobs_table,
        "settings": _settings,
    }
    if name not in makers:
        raise ValueError(f"`{{{{{mark}}}}}` is unknown: choose one of figure, setting, {', '.join(makers)}.")
    return makers[name](study, store, *options)


def facts(study: Study, store: Store) -> str:
    """One sentence on where the numbers come from."""
    results = store.results.values()
    dates = sorted({result["date"] for result in results})
    hours = sum(result["seconds"] for result in results) / 3600
    machines = " and ".join(sorted({session["machine"] for session in store.sessions}))
    versions = ", ".join(f"{name} {version}" for name, version in store.sessions[-1]["versions"].items())
    return (
        f"{len(store.results)} runs, {hours:.1f} hours of one core each ({machines}), {dates[0]} to {dates[-1]}; "
        f"{versions}."
    )


def _settings(study: Study, store: Store) -> str:
    return "\n\n".join(
        f"### `{setting.name}`: {setting.title}\n\n{tables.setting_table(setting, study, store)}"
        for setting in study.settings
    )


TEMPLATE = HERE / "page.template.md"
