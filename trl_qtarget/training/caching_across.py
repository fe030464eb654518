"""The cache of a teacher that has a tokenizer of its own: it reads the text in its own tokens."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..loss.head import gathered, vocabulary_of
from ..loss.read_top_k import log_probs_by_block
from ..priors.across import Crossing
from ..priors.choice import name_of
from ..priors.reference import ModelPrior, freeze
from ..priors.store import PriorCache, tokenizer_fingerprint
from ..priors.store_writer import Example
from ..priors.tokens import tokenizer_of
from .caching import Writer, row_of


if TYPE_CHECKING:
    from .trainer import QTargetSFTTrainer


logger = get_logger(__name__)


class WriterAcross(Writer):
    """Asks a teacher in its own tokens, and carries over what it says of the policy's.

    Args:
        trainer: holds the policy's datasets.
        teacher: the model.
        tokenizer: the teacher's.
        k: how many of the policy's tokens are kept at every place.

    Raises:
        ValueError: the tokenizers cannot be compared, share fewer than `k` tokens, or are the same.
    """

    def __init__(self, trainer: "QTargetSFTTrainer", teacher: PreTrainedModel, tokenizer: Any, k: int):
        placed, model = freeze(teacher, trainer.accelerator)
        self._ask(trainer, ModelPrior(placed, model), tokenizer)
        ours = tokenizer_of(trainer.processing_class)
        self.crossing = Crossing(ours, tokenizer, self.rows, vocabulary_of(model))
        if tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(ours):
            raise ValueError("`own_tokens`: the teacher has the policy's tokens, and needs no tokenizer of its own.")
        if k > (shared := int(self.crossing.shared.sum())):
            raise ValueError(f"`k={k}` is more than the {shared} tokens that the policy shares with the teacher.")
        states = self._states([[0, 0]])
        with gathered(states.head()) as (head,):
            manifest = self._manifest("top_k", k, states, head)
        title = f"the reference model (`{name_of(teacher)}`), which reads its own tokens"
        self.manifest = replace(manifest, vocabulary=self.rows, prior=title, own_tokenizer=self.crossing.fingerprint)

    def _of_batch(self, examples: list[Example], datasets: list[Dataset]) -> list[Mapping[str, Tensor]]:
        whole = [row_of(datasets, example.row)["input_ids"] for example in examples]
        readings = [self.crossing.read(ids) for ids in whole]
        k, rows = self.manifest.k, sum(len(example.positions) for example in examples)
        fields = {
            "ids": torch.arange(k).repeat(rows, 1),
            "log_probs": torch.full((rows, k), -math.log(k + 1)),
            "label_log_probs": torch.full((rows,), -math.log(k + 1)),
            "rest_log_mass": torch.full((rows,), math.nan),  # nothing is known
        }
        # Where the teacher has something to say: its row in the batch and its place there, the label, our own row.
        asked, row = [], 0
        for number, (example, ids, reading) in enumerate(zip(examples, whole, readings, strict=True)):
            for position in example.positions:
                if (place := reading.places.get(position)) is not None:
                    asked.append((number, place, ids[position], row))
                row += 1
        if asked:
            # Of those alone, and no further than is asked.
            lasts: dict[int, int] = {}
            for number, place, *_ in asked:
                lasts[number] = max(place, lasts.get(number, 0))
            states = self._states([readings[number].ids[: last + 1] for number, last in lasts.items()])
            rows_of = {number: row for row, number in enumerate(lasts)}
            asked = [(rows_of[number], *rest) for number, *rest in asked]
            numbers, places, labels, own = torch.tensor(asked, device=states.hidden.device).T
            with gathered(states.head(), device=states.hidden.device) as (head,):
                for block, log_probs in log_probs_by_block(states.hidden[numbers, places], head):
                    for name, values in self.crossing.carried(log_probs, labels[block], k).items():
                        fields[name][own[block].cpu()] = values.to("cpu", fields[name].dtype)
        fields["ids"] = fields["ids"].int()
        split = {name: value.split([len(example.positions) for example in examples]) for name, value in fields.items()}
        return [{name: values[number] for name, values in split.items()} for number in range(len(examples))]


def say_share(directory: str | Path) -> None:
    """Log the share of a cache's labels of which something is known."""
    share = PriorCache(directory).known_share
    logger.info(
        f"Of {share:.1%} of the labels the teacher has said something: it has the same token at the same place. Of "
        "all others nothing is known, and the policy is its own prior there."
    )
