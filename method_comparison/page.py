"""The page: a template whose marks `{{...}}` are filled with tables and figures of the results."""

from pathlib import Path

from trl_qtarget.files import replacing

from . import claims, figures, prose, tables
from .analysis import Tested
from .settings import HERE, Study
from .store import Store


# The words of the committed page.
TEMPLATE = HERE / "page.template.md"
# The page of a rerun: all tables, without the words that were written about other results.
PLAIN = """# Comparison of methods

{{facts}} {{coverage}}

Differences are in percentage points, paired by prompt, ± one standard error; bold beyond two. † the best learning rate
or knob lies on an edge of what was tried.

## Models

{{models}}

## Difference to plain SFT

{{wins:sft}}

{{differences:sft:best T}}

{{figure:differences}}

## How well does one choice do everywhere

{{everywhere}}

## Variants

{{variants}}

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
        ValueError: there are no results, or the template has a mark that is unknown or that they contradict.
    """
    if not store.results:
        raise ValueError(f"`results`: {store.directory} holds no results to write about.")
    text = template.read_text(encoding="utf-8") if template else PLAIN
    directory.mkdir(parents=True, exist_ok=True)
    path, tested = directory / "README.md", Tested(study, store)
    text = prose.filled(text, lambda mark: _fill(mark, tested, directory))
    with replacing(path) as whole:
        whole.write_text(prose.wrapped(text), encoding="utf-8")
    return path


def _fill(mark: str, tested: Tested, directory: Path) -> str:
    if (claim := claims.say(mark, tested)) is not None:
        return claim
    name, *options = mark.split(":")
    if name == "figure":
        return f"![{options[0]}]({figures.draw(options[0], tested, directory).relative_to(directory)})"
    if name == "setting":
        return tables.setting_table(next(s for s in tested.study.settings if s.name == options[0]), tested)
    makers = {
        "facts": facts,
        "coverage": coverage,
        "models": tables.models_table,
        "wins": tables.wins_table,
        "differences": tables.difference_table,
        "everywhere": tables.everywhere_table,
        "variants": tables.variants_table,
        "rates": tables.rates_table,
        "ratios": tables.ratios_table,
        "knobs": tables.knobs_table,
        "knob_names": knob_names,
        "settings": _settings,
    }
    if name not in makers:
        raise ValueError(f"`{{{{{mark}}}}}` is unknown: choose one of figure, setting, {', '.join(makers)}.")
    return makers[name](tested, *options)


def facts(tested: Tested) -> str:
    """One sentence on where the numbers come from."""
    store = tested.store
    return f"{len(store.results)} runs of seconds to minutes on one core each; {store.origin}."


def coverage(tested: Tested) -> str:
    """Whether all settings are measured, and which are not."""
    settings = tested.study.settings
    missing = [f"`{setting.name}`" for setting in settings if tested.untested(setting)]
    if not missing:
        return f"All {len(settings)} settings are measured."
    return (
        f"**Not complete yet:** of {len(settings)} settings, {len(missing)} are still to be measured, in whole or in "
        f"part: {', '.join(missing)}. `make comparison` goes on with them."
    )


def knob_names(tested: Tested) -> str:
    """Which knob of each method was tuned."""
    return ", ".join(f"`{method.name}`: {method.knob}" for method in tested.study.common_methods if method.knob)


def _settings(tested: Tested) -> str:
    return "\n\n".join(
        f"### `{setting.name}`: {setting.title}\n\n{tables.setting_table(setting, tested)}"
        for setting in tested.study.settings
    )
