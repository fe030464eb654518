"""Methods in places where there are logits and no training data, on which some measure a knob of theirs."""

from typing import Any

from trl_qtarget import METHODS, QTargetConfig


# What stands for a number that is measured.
_NUMBERS = {"adaptive_sft": {"alpha": 0.5}}


def with_numbers(name: str, **fields: Any) -> QTargetConfig:
    """A method with a number for every knob."""
    return QTargetConfig(name, **_NUMBERS.get(name, {}) | fields)


# Methods that measure nothing.
CLOSED = [name for name in METHODS if not QTargetConfig(name).open_knobs]
