"""Values in messages, whatever they are."""

import reprlib


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
