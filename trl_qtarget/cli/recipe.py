"""Arguments from the command line and from a recipe, a YAML file: whatever is wrong with them is a ValueError."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from .options import refuse


class Parser(TrlParser):
    """`TrlParser`, which reads a recipe only where it means one thing, and whose refusals are one message."""

    def error(self, message: str) -> NoReturn:
        refuse(message)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: Any) -> tuple[Any, ...]:
        if args is not None:
            args = separated(args)
            self._check_single(recipe_of(args))
        try:
            return super().parse_args_and_config(args, **options)
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"an argument has a value that it cannot take: {error}.") from error

    def _check_single(self, recipe: dict[str, Any]) -> None:
        """A recipe's values go past `argparse`, and `SFTConfig` would take a list for a number."""
        for action in self._actions:
            value, switch = recipe.get(action.dest), action.const is True
            if isinstance(value, list | dict) and (switch or action.type in (int, float)):
                wanted = "true or false" if switch else "a number"
                raise ValueError(f"`{action.dest}` must be {wanted}, got `{type(value).__name__}`.")


def separated(arguments: Iterable[str]) -> list[str]:
    """`--config=file` in two, as `TrlParser` wants it."""
    return [part for item in arguments for part in (item.split("=", 1) if item.startswith("--config=") else [item])]


def names_given(arguments: Sequence[str]) -> set[str]:
    """The arguments that the command line and its recipe set.

    Raises:
        ValueError: as `recipe_of`.
    """
    words = {item.partition("=")[0][2:].replace("-", "_") for item in arguments if item.startswith("--")}
    return words | set(recipe_of(arguments))


def recipe_of(arguments: Sequence[str]) -> dict[str, Any]:
    """What the recipe of a command line says; nothing where there is none.

    Raises:
        ValueError: `--config` has no value or stands twice, or its file is no recipe.
    """
    given = [index for index, item in enumerate(arguments) if item == "--config"]
    if not given:
        return {}
    if len(given) > 1:
        raise ValueError("`--config` stands twice: write both recipes into one file.")
    if given[0] + 1 == len(arguments):
        raise ValueError("`--config` needs a value: the path of a YAML file.")
    return read_recipe(arguments[given[0] + 1])


def read_recipe(file: str) -> dict[str, Any]:
    """A YAML file of arguments by name.

    Raises:
        ValueError: there is no such file, it is no YAML, or it does not give names values, each name once.
    """
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"`--config {file}` cannot be read ({error}): name a YAML file in UTF-8.") from None
    try:
        values = yaml.load(text, _EachOnce)
    except Exception as error:  # beside YAMLError, whatever the constructor of a value raises, and RecursionError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"`--config {file}` is no valid YAML ({reason}): correct it.") from None
    if not isinstance(values, dict):
        raise ValueError(f"`--config {file}` holds no arguments: write lines such as `method: asft`.")
    for name in values:
        if not isinstance(name, str):
            raise ValueError(f"`--config {file}` has the name `{name!r:.60}`, which is no string: correct it.")
    return values


class _EachOnce(yaml.SafeLoader):
    """YAML allows no name twice in a mapping; PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value != "<<":
                if name.value in names:
                    raise ValueError(f"`{name.value:.60}` stands in it twice")
                names.add(name.value)
        return super().construct_mapping(node, deep)
