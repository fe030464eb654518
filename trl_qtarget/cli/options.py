"""What the commands share: methods as a word, and what was probably meant by options that no parser knows."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from ..target.config import QTargetConfig
from ..target.methods import METHODS
from ..target.shown import nearest


# What people write who come from other programs; no spelling leads from these to the right ones.
_USUAL = {
    "--lr": "--learning_rate",
    "--epochs": "--num_train_epochs",
    "--num_epochs": "--num_train_epochs",
    "--batch_size": "--per_device_train_batch_size",
    "--model": "--model_name_or_path",
    "--model_name": "--model_name_or_path",
    "--dataset": "--dataset_name",
    "--teacher": "--ref_model_name_or_path",
    "--ref_model": "--ref_model_name_or_path",
}


def refuse(message: str) -> NoReturn:
    """What `argparse` says instead of printing all options and leaving: `argument --lam: ...`."""
    if found := re.match(r"ambiguous option: (--\w+)\S* could match (.*)", message):
        name, could = found[1], [f"`{each}`" for each in found[2].split(", ") if "-" not in each[2:]]
        hint = suggestion(name, _USUAL.values()) if name in _USUAL else f": did you mean one of {', '.join(could)}?"
        raise ValueError(f"`{name}` is no option{hint}")
    raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"`\1`:", message))


def suggestion(name: str, known: Iterable[str]) -> str:
    """`: did you mean ...?` with the nearest known names; empty if none is near."""
    known, usual = list(known), _USUAL.get(name)
    near = [f"`{usual}`"] if usual in known else nearest(name, known, most=3)
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
