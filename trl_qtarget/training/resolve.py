"""The target that a `QTargetConfig` and training arguments name together."""

from typing import Any

from transformers import TrainingArguments

from ..target.config import QTargetConfig


def resolve_config(config: Any, args: TrainingArguments | None, compute_loss_func: Any = None) -> QTargetConfig:
    """The target that the two configurations name together; contradictions are refused."""
    loss_type = getattr(args, "loss_type", None)
    if config is None and loss_type == "dft":
        config = "dft"
    config = QTargetConfig.coerce(config)
    if loss_type == "dft" and config.method != "dft":
        raise ValueError(
            f"`loss_type='dft'` in the `SFTConfig` contradicts `qtarget_config` ({config.label}): leave `loss_type` "
            "at its default, or set `method='dft'`."
        )
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            f"`label_smoothing_factor` in the `{type(args).__name__}` would replace the target: set it to 0 and use "
            f"`QTargetConfig('label_smoothing', lam={args.label_smoothing_factor})`."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` would replace the target: remove it, or register your objective with "
            "`register_trust` and `register_residual`."
        )
    return config
