"""`trl-qtarget recipes`: the recipes and examples that came with the package, listed and copied."""

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..target.shown import nearest
from .options import refuse


# What is listed: recipes of `trl-qtarget sft`, scripts, and what many machines need.
_SUFFIXES = (".yaml", ".py", ".sh", ".sbatch", ".ipynb", ".md")


def shelf() -> Path:
    """The folder of the examples: inside an installed package, or beside the package of a checkout.

    Raises:
        ValueError: there is none.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_examples", package.parent / "examples"):
        if folder.is_dir():
            return folder
    raise ValueError("The recipes are missing from this installation: install the package again.")


def main(arguments: Sequence[str]) -> int:
    """List what there is, or copy some of it.

    Raises:
        ValueError: a name is unknown, or a file of that name is there already.
    """
    parser = argparse.ArgumentParser(
        prog="trl-qtarget recipes", description="List the recipes and examples, or copy some of them."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="file or folder to copy, as it is listed")
    parser.add_argument("--output", type=Path, default=Path(), help="folder to copy into; default: this one")
    parser.error = refuse
    chosen = parser.parse_args(arguments)
    folder = shelf()
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and "__pycache__" not in path.parts)
    if not chosen.names:
        sys.stdout.write(_listed(files, folder))
        return 0
    copies = [pair for name in chosen.names for pair in _copies(name, files, folder, chosen.output)]
    for _, target in copies:
        if target.exists():
            raise ValueError(f"`output`: {target} is there already: name another folder with `--output`.")
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        sys.stdout.write(f"{target}\n")
    return 0


def _listed(files: Sequence[Path], folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in files]
    width = max(map(len, names))
    lines = [f"{name:<{width}}  {_title(path)}".rstrip() for name, path in zip(names, files, strict=True)]
    return (
        "\n".join([*lines, "", "`trl-qtarget recipes NAME` copies one, or a folder, into the working directory."])
        + "\n"
    )


def _title(path: Path) -> str:
    """What a file says of itself first."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    elif path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    line = next((line for line in text.splitlines() if re.match(r"(# )?\s*\w", line)), "")
    return line.lstrip("# ").split(". ")[0].rstrip(".:")


def _copies(name: str, files: Sequence[Path], folder: Path, output: Path) -> list[tuple[Path, Path]]:
    """Files that a name means, and where each goes: a folder with what it is called, a file by its own name."""
    known = {path.relative_to(folder).as_posix(): path for path in files}
    inside = {key: path for key, path in known.items() if key.startswith(f"{name.rstrip('/')}/")}
    if inside:
        parent = name.rstrip("/").rpartition("/")[0]
        return [(path, output / key.removeprefix(f"{parent}/" if parent else "")) for key, path in inside.items()]
    found = [path for key, path in known.items() if name in (key, path.name, path.stem)]
    if len(found) == 1:
        return [(found[0], output / found[0].name)]
    if found:
        same = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise ValueError(f"`{name}` may be any of {same}: write one of them.")
    near = nearest(name, [*known, *(path.stem for path in files)], most=3)
    raise ValueError(f"`{name}` is no recipe: " + (f"did you mean {' or '.join(near)}?" if near else "see the list."))
