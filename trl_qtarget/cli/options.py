"""Options that no parser knows: what was probably meant."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """`: did you mean ...?` with the nearest known names; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f": did you mean {' or '.join(f'`{each}`' for each in near)}?" if near else ""


def check_known(remaining: Iterable[str], accepted: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an option that nobody takes.

    Args:
        remaining: what a parser left over, options and their values.
        accepted: options that someone else takes.
        known: all options that exist, to suggest from.

    Raises:
        ValueError: an option is unknown; the message suggests known ones.
    """
    accepted = set(accepted)
    for item in remaining:
        name = item.partition("=")[0]
        if name.startswith("--") and name not in accepted and name.replace("-", "_") not in accepted:
            raise ValueError(f"`{name}` is no option{suggestion(name, known) or '; `--help` lists all of them.'}")
