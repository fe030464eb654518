"""Supervised fine-tuning toward an explicit target distribution: a plugin of Hugging Face TRL."""

from typing import TYPE_CHECKING, Any

from .config import QTargetConfig
from .dense import Target, build_target, induced_target, qtarget_loss
from .linear import LinearQTargetOutput, linear_qtarget_loss
from .methods import METHODS
from .residual import register_residual
from .trust import register_trust


if TYPE_CHECKING:
    from .trainer import QTargetSFTTrainer

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "LinearQTargetOutput",
    "QTargetConfig",
    "QTargetSFTTrainer",
    "Target",
    "__version__",
    "build_target",
    "induced_target",
    "linear_qtarget_loss",
    "qtarget_loss",
    "register_residual",
    "register_trust",
]


def __getattr__(name: str) -> Any:
    # TRL and transformers take seconds to import, and the losses need neither.
    if name == "QTargetSFTTrainer":
        from .trainer import QTargetSFTTrainer

        return QTargetSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
