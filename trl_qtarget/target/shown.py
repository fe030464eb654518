"""Values in messages, whatever they are, and what was probably meant by a wrong name."""

import difflib
import reprlib
from collections.abc import Iterable


class _Shown(reprlib.Repr):
    """`repr` for messages: short whatever is shown, and never an error of its own."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlevel = 2

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits.
        return f"an integer of {value.bit_length()} bits" if value.bit_length() > 200 else repr(value)


shown = _Shown().repr


def number(value: float | str) -> str:
    """A knob's value: a number without needless digits, or the word that stands for one."""
    return value if isinstance(value, str) else f"{value:g}"


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that are near to one that is not, the nearest first, in backticks."""
    return [f"`{each}`" for each in difflib.get_close_matches(name, list(known), n=most)]
