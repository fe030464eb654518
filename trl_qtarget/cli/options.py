"""What the commands share: methods as a word, and what was probably meant by options that no parser knows."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from ..target.config import QTargetConfig
from ..target.methods import METHODS
from ..target.shown import nearest


def refuse(message: str) -> NoReturn:
    """What `argparse` says instead of printing all options and leaving: `argument --lam: ...`."""
    raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"`\1`:", message))


def suggestion(name: str, known: Iterable[str]) -> str:
    """`: did you mean ...?` with the nearest known names; empty if none is near."""
    near = nearest(name, known, most=3)
    return f": did you mean {' or '.join(near)}?" if near else ""


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


def read_method(text: str) -> QTargetConfig:
    """A method as the command line writes it: `asft`, `asft:lam=0.03,prior=base`, or the path of a configuration.

    The name of a method is that method, whatever folders there are; `./asft` is the folder.

    Raises:
        ValueError: it is neither, or a knob is wrong.
    """
    name, _, knobs = text.partition(":")
    if name not in METHODS and not knobs and ("/" in text or text.endswith(".json") or os.path.isdir(text)):
        return QTargetConfig.from_pretrained(text)
    fields: dict[str, Any] = {"method": name}
    for knob in knobs.split(",") if knobs else []:
        key, equals, value = knob.partition("=")
        if not equals:
            raise ValueError(f"`methods`: `{knob}` in `{text}` is not of the form knob=value.")
        if key in fields:
            raise ValueError(f"`methods`: `{text}` has `{key}` twice: leave one of them.")
        fields[key] = _value(value)
    return QTargetConfig.coerce(fields)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a string, too many digits, or nested too deep: for the check of the field
        return text
