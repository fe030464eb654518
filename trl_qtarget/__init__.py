"""Supervised fine-tuning toward an explicit target distribution: a plugin of Hugging Face TRL."""

from .config import QTargetConfig
from .dense import Target, build_target, induced_target, qtarget_loss
from .linear import LinearQTargetOutput, linear_qtarget_loss
from .methods import METHODS
from .residual import register_residual
from .trust import register_trust


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "LinearQTargetOutput",
    "QTargetConfig",
    "Target",
    "__version__",
    "build_target",
    "induced_target",
    "linear_qtarget_loss",
    "qtarget_loss",
    "register_residual",
    "register_trust",
]
