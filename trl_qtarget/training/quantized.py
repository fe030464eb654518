"""4-bit layers that stay trainable after a pass in evaluation mode."""

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the 4-bit weights of a model that is trained.

    On a CPU with AVX512-BF16 it packs them in the first pass in evaluation mode, be it an evaluation or a prior's, and
    a packed layer passes no gradient to its input, without a word.

    Raises:
        ValueError: the model has been packed already.
    """
    for name, module in model.named_modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"`model`: bitsandbytes has packed the 4-bit weights of `{name}` for inference on this CPU, when "
                "the model ran in evaluation mode, and no gradient passes such a layer: load the model again."
            )
        module.support_avx512bf16_for_cpu = False
