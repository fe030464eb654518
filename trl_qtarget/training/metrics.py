"""What is logged of the target: sums over a batch that stay on the device until they are read."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..loss.linear import LinearQTargetOutput


# Each a mean over the scored tokens that have it: signed targets have no KL, and there may be no prior to agree.
TARGET_METRICS = ("nll", "trust", "label_mass", "kl", "prior_agreement")


def target_means(totals: Iterable[float]) -> dict[str, float]:
    """`target/...` from the sums of `local_sums` over everything since the last report; none without a token."""
    values = list(totals)[4:]
    sums, counts = values[: len(TARGET_METRICS)], values[len(TARGET_METRICS) :]
    named = zip(TARGET_METRICS, sums, counts, strict=True)
    return {f"target/{name}": total / count for name, total, count in named if count}


def local_sums(tokens: LinearQTargetOutput, inputs: Mapping[str, Any]) -> Tensor:
    """This rank's sums: scored tokens, all tokens, entropy, top-1 hits; `TARGET_METRICS`; tokens that have each."""
    if "attention_mask" in inputs:
        all_tokens = inputs["attention_mask"].sum()
    elif "position_ids" in inputs:
        all_tokens = torch.tensor(inputs["position_ids"].size(1))
    else:
        raise ValueError("`data_collator` must return `attention_mask` or `position_ids`: add one of them.")
    columns = (tokens.nll, tokens.trust, tokens.label_mass, tokens.kl, tokens.prior_is_top1)
    sums = [tokens.scored.sum(), all_tokens, tokens.entropy.sum(), tokens.is_top1.sum()]
    sums += [column.nan_to_num(nan=0.0).sum() for column in columns]
    sums += [(tokens.scored & ~column.isnan()).sum() for column in columns]
    return torch.stack([value.to(tokens.nll.device, torch.float32) for value in sums])
