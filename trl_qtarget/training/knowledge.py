"""What the policy knows of its training data before it is trained, for knobs that follow it (`alpha="auto"`)."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from ..loss.body import inference
from ..loss.linear import LinearQTargetOutput
from ..loss.request import Sealed, TargetRequest, next_token
from ..priors.choice import PriorChoice
from ..target.config import QTargetConfig
from ..target.measured import Knowledge
from ..target.tile import sequence_means
from .batch import ALL_KEYS
from .columns import sequences_of


logger = get_logger(__name__)

# Rows of the dataset that are looked at: enough for the quartile of what they hold, and seconds of work.
SAMPLE = 256
# What is asked for: the policy's own probabilities.
_PLAIN = QTargetConfig("sft").objective(has_prior=False)


class SettlingMixin:
    """Measures the knobs that a target leaves to the data, for a `transformers.Trainer` to inherit before its own."""

    qtarget_config: QTargetConfig
    prior_choice: PriorChoice
    _knowledge: Knowledge | None = None

    def settled(self, config: QTargetConfig, model: Any = None) -> QTargetConfig:
        """A target with its open knobs (`"auto"`) as the policy and its training data have them.

        They are measured when they are first asked for: by the first step or evaluation, before anything is trained.
        Every process calls this.

        Args:
            config: the target.
            model: the policy in its wrapper; None is the one of the training.

        Raises:
            ValueError: there is no training data, or nothing in it is labelled.
        """
        if not config.open_knobs:
            return config
        if self._knowledge is None:
            if self.train_dataset is None:
                raise ValueError(
                    f"`{config.open_knobs[0]}='auto'` is measured on the training data, and `train_dataset` is None: "
                    "pass one, or give a number."
                )
            model = model or (self.model_wrapped if self.is_in_train else self.model)
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
            self._knowledge = measure_knowledge(
                sampled_rows(self.train_dataset),
                lambda rows: self._prepare_inputs(collate(rows)),
                lambda inputs: self._policy_alone(model, inputs),
                self.accelerator,
                self.args.eval_batch_size,
                self.get_tp_size(),
            )
        return config.settled(self._knowledge)

    def _settle(self, model: Any) -> None:
        """Measure what this run's own target leaves open, once."""
        open_knobs = self.qtarget_config.open_knobs
        if not open_knobs:
            return
        self._take(self.settled(self.qtarget_config, model))
        values = ", ".join(f"`{name}` is {self.qtarget_config.knobs[name]:.4g}" for name in open_knobs)
        logger.info(
            f"{self.qtarget_config.label}: {values}, since of {self._knowledge.sequences} sequences of the training "
            f"data a quarter has a mean NLL of at most {self._knowledge.quartile:.4g} nats per label."
        )

    def _take(self, config: QTargetConfig) -> None:
        self.qtarget_config = config
        self.prior_choice = self.prior_of(config)

    def _policy_alone(self, model: Any, inputs: Mapping[str, Any]) -> LinearQTargetOutput:
        """The policy's statistics of every token of a batch."""
        inputs = {key: value for key, value in inputs.items() if key not in ALL_KEYS}
        config = self.qtarget_config
        request = TargetRequest(_PLAIN, chunk_tokens=config.chunk_tokens, kernel=config.kernel)
        with inference(self.model), self.accelerator.autocast():
            return model(**inputs, use_cache=False, qtarget=Sealed(request)).tokens


def sampled_rows(dataset: Any) -> list[Any]:
    """Rows from all over a dataset, or the first ones of a stream; the same on every process."""
    if isinstance(dataset, Iterable) and not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, SAMPLE))
    count = min(SAMPLE, len(dataset))
    places = [number * len(dataset) // count for number in range(count)]
    return list(dataset.select(places)) if isinstance(dataset, Dataset) else [dataset[place] for place in places]


def measure_knowledge(
    rows: Sequence[Any],
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    tokens_of: Callable[[Mapping[str, Any]], LinearQTargetOutput],
    accelerator: Accelerator,
    batch_size: int,
    replicas: int = 1,
) -> Knowledge:
    """The lower quartile, over sequences, of the mean NLL of their labels.

    Every process calls this, and all of them run equally many batches.

    Args:
        rows: of the dataset, the same on every process.
        collate: makes a batch of rows, on the device.
        tokens_of: the policy's statistics of a batch.
        accelerator: knows the processes.
        batch_size: rows of a batch.
        replicas: how many processes in a row work on one batch, as under tensor parallelism.

    Raises:
        ValueError: no row has a label, or the policy gives NaN.
    """
    share, shares = accelerator.process_index // replicas, accelerator.num_processes // replicas
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    means: list[Tensor] = []
    for first in range(0, len(batches), shares):
        is_own = first + share < len(batches)
        # Who has none left runs another's, since all processes take part in the pass of a sharded model.
        inputs = collate(batches[first + share if is_own else first])
        found = _sequence_means(tokens_of(inputs), inputs)
        means += [found] if is_own else []
    own = torch.cat(means) if means else torch.zeros(0, device=accelerator.device)
    # Processes have different numbers of sequences: NaN fills them up, so a NaN of the policy is infinity here.
    own = own.nan_to_num(nan=torch.inf, posinf=torch.inf)
    padded = accelerator.pad_across_processes(own, pad_index=torch.nan)
    every = accelerator.gather(padded[None]).reshape(accelerator.num_processes, -1)[::replicas].flatten()
    every = every[~every.isnan()].double().cpu()
    if not len(every):
        raise ValueError(
            "`alpha='auto'` is measured on the training data, and no row that was looked at has a labelled token: "
            "check `max_length` and `completion_only_loss`, or give a number."
        )
    if not every.isfinite().all():
        raise ValueError("`alpha='auto'` is measured with the model as it starts, which gives NaN: check its weights.")
    return Knowledge(torch.quantile(every, 0.25).item(), len(every))


def _sequence_means(tokens: LinearQTargetOutput, inputs: Mapping[str, Any]) -> Tensor:
    """The mean NLL of the labels of each sequence of a batch that has any, one number per sequence."""
    sequences = sequences_of(inputs)
    # Prompt learning has put virtual tokens before the text, which belong to no sequence.
    virtual = len(tokens.nll) // len(sequences) - sequences.size(1)
    sequences = next_token(F.pad(sequences, (virtual, 0))).to(tokens.nll.device)[tokens.scored]
    means = sequence_means(tokens.nll[tokens.scored].float(), sequences)
    names, place = sequences.unique(return_inverse=True)
    return means.new_zeros(len(names)).scatter_(0, place, means)
