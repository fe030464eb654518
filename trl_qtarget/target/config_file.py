"""`qtarget_config.json`: the fields of a target, as they lie beside the weights that were trained toward it."""

import json
import os
from pathlib import Path
from typing import Any

from ..files import replacing
from .shown import shown


CONFIG_NAME = "qtarget_config.json"
# What a file says beside the fields, for who reads it: where the prior came from, and what wrote it.
_PROVENANCE = "provenance"


def write_fields(values: dict[str, Any], directory: Path, provenance: dict[str, Any] | None = None) -> None:
    """Write the file into a directory, which is made if it does not exist; it is whole or not there."""
    directory.mkdir(parents=True, exist_ok=True)
    values = values | ({_PROVENANCE: provenance} if provenance else {})
    with replacing(directory / CONFIG_NAME) as file:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_fields(path: Path) -> tuple[dict[str, Any], Path]:
    """The fields of a file, given by its own path or by its directory's, and the path of the file.

    Raises:
        ValueError: there is no such file, it is not JSON, or names a field twice.
    """
    # Where a path is none (too long, a zero byte), these two say no, and those of `Path` raise.
    directory, path = path, path / CONFIG_NAME if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise ValueError(f"`directory` has no `{CONFIG_NAME}`: {directory} was not written by `save_pretrained`.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too many digits, or nested too deep
        raise ValueError(f"`{path}` is not valid JSON ({error}): write it again with `save_pretrained`.") from None
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` does not hold a JSON object: write it again with `save_pretrained`.")
    values.pop(_PROVENANCE, None)
    return values, path


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which may name a key twice and mean either."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has {shown(name)} twice")
        values[name] = value
    return values
