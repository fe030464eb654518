"""What is the model being taught? Targets of real examples, on a page, during training, and as curves."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callback import InspectionCallback
    from .collect import inspect_target
    from .render import write_page
    from .suspicious import suspicious_examples, suspicious_tokens

__all__ = ["InspectionCallback", "inspect_target", "suspicious_examples", "suspicious_tokens", "write_page"]

_MODULES = {
    "InspectionCallback": "callback",
    "inspect_target": "collect",
    "suspicious_examples": "suspicious",
    "suspicious_tokens": "suspicious",
    "write_page": "render",
}


def __getattr__(name: str) -> Any:
    # Curves need neither the trainer nor what it imports.
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
