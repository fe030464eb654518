"""What a study maximises: a number for each prompt where there is one, so that two models can be compared in pairs."""

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..loss.request import IGNORE_INDEX
from ..training.trainer import QTargetSFTTrainer
from .answers import find_judge, shares_right
from .functions import find_function


JUDGED = ("average_at_k", "greedy_accuracy")
OF_LABELS = ("eval_target/nll", "eval_mean_token_accuracy")


@dataclass(frozen=True)
class Metric:
    """A metric by name, and how it is measured.

    Attributes:
        name: one of `JUDGED` or `OF_LABELS`, or `module:function`.
        judge: name of a judge, for `JUDGED`.
        samples: the k of `average_at_k`.
        temperature: of its samples.
        max_new_tokens: the longest answer.
    """

    name: str
    judge: str = "exact"
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 256

    def check(self) -> None:
        """Raise a ValueError where the metric is unknown, cannot be compared between objectives, or does not fit."""
        if self.name in ("eval_loss", "loss"):
            raise ValueError(
                "`metric='eval_loss'` is each objective's own value, on a scale of its own: a lower one says nothing "
                f"of a better model. Choose one of {', '.join((*JUDGED, *OF_LABELS))}, or `module:function`."
            )
        if self.name in JUDGED:
            find_judge(self.judge)
        elif ":" in self.name:
            find_function(self.name, "metric")
        elif self.name not in OF_LABELS:
            known = ", ".join((*JUDGED, *OF_LABELS))
            raise ValueError(f"`metric={self.name!r}` is unknown: choose one of {known}, or `module:function`.")
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")
        if not 0 <= self.temperature < math.inf or (self.name == "average_at_k" and not self.temperature):
            raise ValueError(f"`temperature={self.temperature}` must be above 0; `greedy_accuracy` samples nothing.")

    @property
    def lower_is_better(self) -> bool:
        """Whether the number that people see is the score with another sign."""
        return self.name == "eval_target/nll"

    @property
    def needs_answers(self) -> bool:
        """Whether the sets must have prompts and right answers."""
        return self.name in JUDGED

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        training: SFTConfig,
        seed: int = 0,
    ) -> list[float]:
        """One score for each row, or a single one where the metric is a user's and gives no more; larger is better.

        Args:
            model: what was trained.
            tokenizer: its tokenizer.
            rows: with `prompt` and `answer` for judged answers; else in any format that the trainer takes.
            training: how rows become tokens, for metrics of labels.
            seed: of the sampling.

        Raises:
            ValueError: a user's function returned no finite number.
        """
        if self.name in OF_LABELS:
            return label_scores(model, tokenizer, rows, training, self.name)
        if self.name in JUDGED:
            return shares_right(
                model,
                tokenizer,
                rows["prompt"],
                rows["answer"],
                find_judge(self.judge),
                samples=self.samples,
                temperature=self.temperature if self.name == "average_at_k" else 0.0,
                max_new_tokens=self.max_new_tokens,
                batch_size=max(training.per_device_eval_batch_size, self.samples),
                seed=seed,
            )
        return _numbers(find_function(self.name, "metric")(model, tokenizer, rows), self.name)


def _numbers(value: Any, name: str) -> list[float]:
    """What a user's metric returned: a number, or one for each row."""
    values = [value] if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0 else list(value)
    values = [float(each) for each in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"`metric={name!r}` returned no finite number: {value!r:.80}.")
    return values


def label_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, training: SFTConfig, name: str
) -> list[float]:
    """Of each row the mean over its labels: minus the NLL, or the share that is the model's first choice.

    Raises:
        ValueError: a row has no label.
    """
    scores = []
    for (logits,), labels in _labelled([model], tokenizer, rows, training):
        if name == "eval_target/nll":
            scores.append(-torch.nn.functional.cross_entropy(logits, labels).item())
        else:
            scores.append((logits.argmax(-1) == labels).float().mean().item())
    return scores


def kl_to_base(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    training: SFTConfig,
) -> float:
    """KL(base‖model) in nats per label, the mean over rows: how far a model has moved on text it should retain."""
    values = []
    for (mine, former), _ in _labelled([model, base], tokenizer, rows, training):
        mine, former = mine.log_softmax(-1), former.log_softmax(-1)
        values.append((former.exp() * (former - mine)).sum(-1).mean().item())
    return mean(values)


def _labelled(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, rows: Dataset, training: SFTConfig
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each row, as the trainer makes tokens of it: the float32 logits `[n, V]` of each model, and labels `[n]`."""
    trainer = QTargetSFTTrainer(
        models[0], training, train_dataset=rows, processing_class=tokenizer, qtarget_config="sft"
    )
    for number, row in enumerate(trainer.prepare_rows(rows, "study")):
        inputs = trainer._prepare_inputs(trainer.data_collator([row]))
        labels = inputs.pop("labels")[:, 1:]
        kept = labels != IGNORE_INDEX
        if not kept.any():
            raise ValueError(f"`metric`: row {number} of a held-out set has no label: leave it out.")
        with torch.inference_mode():
            logits = [model.eval()(**inputs).logits[:, :-1][kept].float() for model in models]
        yield logits, labels[kept]


def mean(scores: Sequence[float]) -> float:
    """The score of a model."""
    return math.fsum(scores) / len(scores)
