"""Functions of the user's own, by name."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def find_function(name: str, argument: str) -> Callable[..., Any]:
    """`module:function`, from the working directory or wherever Python looks.

    Raises:
        ValueError: there is no such function.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`{argument}={name!r}` cannot be imported ({error}): write `module:function`.") from None
    if not callable(found):
        raise ValueError(f"`{argument}={name!r}` is no function: name one as `module:function`.")
    return found
