"""What is logged of the target: sums over a batch that stay on the device until they are read."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .linear import LinearQTargetOutput


# Each a mean over the scored tokens (KL: over those whose target is a distribution).
TARGET_METRICS = ("nll", "trust", "label_mass", "kl")


def target_means(totals: Iterable[float]) -> dict[str, float]:
    """`target/...` from the sums of `local_sums` over everything since the last report; none without a token."""
    count, _, _, _, *target_sums, kl_count = totals
    counts = {name: kl_count if name == "kl" else count for name in TARGET_METRICS}
    sums = dict(zip(TARGET_METRICS, target_sums, strict=True))
    return {f"target/{name}": sums[name] / counts[name] for name in TARGET_METRICS if counts[name]}


def local_sums(tokens: LinearQTargetOutput, inputs: Mapping[str, Any]) -> Tensor:
    """This rank's sums: scored tokens, all tokens, entropy, top-1 hits, `TARGET_METRICS`, tokens with a KL."""
    if "attention_mask" in inputs:
        all_tokens = inputs["attention_mask"].sum()
    elif "position_ids" in inputs:
        all_tokens = torch.tensor(inputs["position_ids"].size(1))
    else:
        raise ValueError("`data_collator` must return `attention_mask` or `position_ids`: add one of them.")
    has_kl = tokens.scored & ~tokens.kl.isnan()
    sums = [
        tokens.scored.sum(),
        all_tokens,
        tokens.entropy.sum(),
        tokens.is_top1.sum(),
        tokens.nll.sum(),
        tokens.trust.sum(),
        tokens.label_mass.sum(),
        tokens.kl.nan_to_num(nan=0.0).sum(),
        has_kl.sum(),
    ]
    return torch.stack([value.to(tokens.nll.device, torch.float32) for value in sums])
