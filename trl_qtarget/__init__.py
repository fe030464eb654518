"""Supervised fine-tuning toward an explicit target distribution: a plugin of Hugging Face TRL."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .inspection.callback import InspectionCallback
    from .inspection.collect import inspect_target
    from .inspection.render import write_page
    from .inspection.suspicious import suspicious_examples, suspicious_tokens
    from .lock import one_run_in
    from .loss.linear import LinearQTargetOutput, linear_qtarget_loss
    from .priors.choice import PolicyFacts, PriorChoice, PriorKind, choose_prior
    from .target.config import QTargetConfig
    from .target.dense import Target, build_target, induced_target, qtarget_loss
    from .target.methods import METHODS
    from .target.objective import Method
    from .target.registry import AtLeastTwo, Count, Exponent, NonNegative, Positive, Range, Unit
    from .target.residual import register_residual
    from .target.tile import LabelStatistics, Measure, Tile, floor_of
    from .target.top_k import TopKPrior
    from .target.trust import register_trust
    from .training.checkpoints import last_whole_checkpoint
    from .training.mixin import QTargetMixin
    from .training.trainer import QTargetSFTTrainer
    from .tuning.answers import find_judge

__version__ = "0.1.0"

# Where each public name lives. A module is imported when one of its names is first asked for: torch takes a second to
# import, TRL several, and neither is needed to read a version or a list of commands.
_HOMES = {
    "inspection.callback": ("InspectionCallback",),
    "inspection.collect": ("inspect_target",),
    "inspection.render": ("write_page",),
    "inspection.suspicious": ("suspicious_examples", "suspicious_tokens"),
    "lock": ("one_run_in",),
    "loss.linear": ("LinearQTargetOutput", "linear_qtarget_loss"),
    "priors.choice": ("PolicyFacts", "PriorChoice", "PriorKind", "choose_prior"),
    "target.config": ("QTargetConfig",),
    "target.dense": ("Target", "build_target", "induced_target", "qtarget_loss"),
    "target.methods": ("METHODS",),
    "target.objective": ("Method",),
    "target.registry": ("AtLeastTwo", "Count", "Exponent", "NonNegative", "Positive", "Range", "Unit"),
    "target.residual": ("register_residual",),
    "target.tile": ("LabelStatistics", "Measure", "Tile", "floor_of"),
    "target.top_k": ("TopKPrior",),
    "target.trust": ("register_trust",),
    "training.checkpoints": ("last_whole_checkpoint",),
    "training.mixin": ("QTargetMixin",),
    "training.trainer": ("QTargetSFTTrainer",),
    "tuning.answers": ("find_judge",),
}

__all__ = [
    "METHODS",
    "AtLeastTwo",
    "Count",
    "Exponent",
    "InspectionCallback",
    "LabelStatistics",
    "LinearQTargetOutput",
    "Measure",
    "Method",
    "NonNegative",
    "PolicyFacts",
    "Positive",
    "PriorChoice",
    "PriorKind",
    "QTargetConfig",
    "QTargetMixin",
    "QTargetSFTTrainer",
    "Range",
    "Target",
    "Tile",
    "TopKPrior",
    "Unit",
    "__version__",
    "build_target",
    "choose_prior",
    "find_judge",
    "floor_of",
    "induced_target",
    "inspect_target",
    "last_whole_checkpoint",
    "linear_qtarget_loss",
    "one_run_in",
    "qtarget_loss",
    "register_residual",
    "register_trust",
    "suspicious_examples",
    "suspicious_tokens",
    "write_page",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            try:
                value = getattr(importlib.import_module(f".{home}", __name__), name)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "trl":
                    raise
                raise ImportError(
                    f"`{name}` needs TRL, which is not installed: `pip install trl`. `QTargetMixin` trains with any "
                    "`transformers.Trainer` without it."
                ) from error
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
