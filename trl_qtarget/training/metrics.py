"""What is logged: sums over batches, which stay on the device until they are reported."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ..loss.linear import LinearQTargetOutput


# Each a mean over the scored tokens that have it: signed targets have no KL, and there may be no prior to agree.
TARGET_METRICS = ("nll", "trust", "label_mass", "kl", "prior_agreement")
_NLL = "target/nll"


def judge_by_nll(args: TrainingArguments, evaluation_sets: Any) -> bool:
    """Let the NLL choose the best checkpoint where nothing has been said of it, and less of it be better.

    The objective's own value, `eval_loss`, says nothing of how good a model is: it is constant for PSFT, and for
    others it may rise while every label becomes more probable.

    Args:
        args: of the trainer. transformers has put "loss" where `metric_for_best_model` was needed and not given; the
            objective's own value is "eval_loss". Of a metric that it does not know it thinks that more is better.
        evaluation_sets: what is evaluated.

    Returns:
        Whether the metric was chosen here.

    Raises:
        ValueError: there are several evaluation sets, and nothing says which one counts.
    """
    chosen = args.metric_for_best_model == "loss"
    if chosen:
        if isinstance(evaluation_sets, Mapping):
            first = next(iter(evaluation_sets), "name")
            raise ValueError(
                "`metric_for_best_model` is not set, and `eval_dataset` holds several sets: name the one that counts, "
                f"`metric_for_best_model='{first}_{_NLL}'`."
            )
        args.metric_for_best_model = _NLL
    if (args.metric_for_best_model or "").endswith((_NLL, "target/kl")):
        args.greater_is_better = False
    return chosen


def sums_dtype(device: torch.device) -> torch.dtype:
    """Of sums over many batches: float64, but on devices that may have none, such as Apple's."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def local_sums(tokens: LinearQTargetOutput, inputs: Mapping[str, Any]) -> Tensor:
    """This rank's sums: scored tokens, all tokens, entropy, top-1 hits; `TARGET_METRICS`; tokens that have each."""
    if "attention_mask" in inputs:
        all_tokens = (inputs["attention_mask"] != 0).sum()  # some number the documents of a row in it
    elif "position_ids" in inputs:
        all_tokens = torch.tensor(inputs["position_ids"].shape[-2:].numel())  # [B, T], or [3, B, T] of images
    else:
        raise ValueError("`data_collator` must return `attention_mask` or `position_ids`: add one of them.")
    scored, kl, agreement = tokens.scored, tokens.kl, tokens.prior_is_top1
    broken = tokens.nll.isnan() | tokens.trust.isnan() | tokens.label_mass.isnan()
    columns = (
        (tokens.nll, scored),
        (tokens.trust, scored),
        (tokens.label_mass, scored),
        # NaN says that there is none, but where a number that it is made of is NaN: that has to be seen.
        (kl, scored & (broken | ~kl.isnan())),
        (agreement, scored & ~agreement.isnan()),
    )
    sums = [scored.sum(), all_tokens, tokens.entropy.sum(), tokens.is_top1.sum()]
    sums += [column.masked_fill(~has, 0.0).sum() for column, has in columns]
    sums += [has.sum() for _, has in columns]
    return torch.stack([value.to(tokens.nll.device, torch.float32) for value in sums])


class RunningMeans:
    """The means of everything since the last report, from sums of one size however many batches there were.

    Args:
        aux_loss: whether there is an auxiliary loss to report.
    """

    def __init__(self, aux_loss: bool = False):
        # TRL's own metrics are means over micro-batches, whatever the number of their tokens.
        self._of_batches = ["entropy", "mean_token_accuracy", *(["aux_loss"] if aux_loss else [])]
        self._sums: Tensor | None = None

    def add(self, sums: Tensor, aux_loss: Tensor | None) -> None:
        """Add a micro-batch: `local_sums` of all ranks together, and the mean auxiliary loss of the ranks."""
        count = sums[0].clamp(min=1)
        of_batch = [torch.ones_like(count), sums[2] / count, sums[3] / count]
        of_batch += [] if aux_loss is None else [aux_loss.to(count)]
        new = torch.cat([torch.stack(of_batch), sums[4:]]).to(sums_dtype(sums.device))
        self._sums = new if self._sums is None else self._sums + new

    def clear(self) -> None:
        """Forget all batches."""
        self._sums = None

    def take(self) -> dict[str, float]:
        """The means by name, and forget the batches; nothing without a batch, no `target/...` without a token."""
        if self._sums is None:
            return {}
        batches, *values = self._sums.tolist()
        self.clear()
        means = {name: values.pop(0) / batches for name in self._of_batches}
        sums, counts = values[: len(TARGET_METRICS)], values[len(TARGET_METRICS) :]
        named = zip(TARGET_METRICS, sums, counts, strict=True)
        return means | {f"target/{name}": total / count for name, total, count in named if count}
