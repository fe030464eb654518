"""Columns with one number per token, kept aligned with the tokens from the dataset to the batch.

TRL prepares, truncates and packs `input_ids` and `labels` only. Where a target needs another column (the weights of
`cft`; the document that a token comes from, for a per-sequence trust under packing; the place where a prior's cache
speaks of it), it takes the same steps here.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..loss.request import IGNORE_INDEX
from ..priors.cached import ROWS_KEY
from ..priors.choice import PriorChoice
from ..priors.store import PriorCache, tokenizer_fingerprint
from ..target.config import QTargetConfig
from .columns import PLACES_KEY, SEQUENCES_KEY, WEIGHTS_KEY, TokenColumns


def check_column(column: str, datasets: dict[str, Any]) -> None:
    """Raise unless every dataset has the weight column."""
    for name, dataset in datasets.items():
        columns = get_dataset_column_names(dataset)
        if column not in columns:
            raise ValueError(
                f"`token_weight_column={column!r}` is missing from the {name} dataset, whose columns are "
                f"{sorted(columns)}: add a list with one weight per token, or name the right column."
            )


def columns_for(config: QTargetConfig, choice: PriorChoice, given: Mapping[str, Any]) -> TokenColumns:
    """The per-token columns that a target needs, checked against the datasets that a trainer is given."""
    args, weights = given.get("args"), None
    if config.uses_token_weights:
        weights = config.token_weight_column or WEIGHTS_KEY
        datasets = {"train": given.get("train_dataset")}
        evaluation = given.get("eval_dataset")
        datasets |= evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        check_column(weights, {name: dataset for name, dataset in datasets.items() if dataset is not None})
    packed = bool(getattr(args, "packing", False) or getattr(args, "eval_packing", False))
    return TokenColumns(weights, packed and choice.objective.trust.per_sequence, choice.cache)


def check_weights(weights: Any, tokens: int, column: str, row: Any) -> list[float]:
    """The weights of one example as floats, if there is one per token, finite and not negative."""
    try:
        weights = [
            math.nan if weight is None else float(weight) for weight in (weights if weights is not None else [])
        ]
    except (TypeError, ValueError):
        raise ValueError(f"`{column}` of example {row} is not a list of numbers: give one weight per token.") from None
    if len(weights) != tokens:
        raise ValueError(
            f"`{column}` of example {row} has {len(weights)} weights for {tokens} tokens: give one weight per token "
            "of `input_ids`, prompt and special tokens included. Tokenize the dataset first to be sure of its length."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"`{column}` of example {row} has a weight that is negative, NaN or infinite: use >= 0.")
    return weights


def is_packed(dataset: Any) -> bool:
    """Whether a dataset has the columns that packing makes."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    return not {"seq_lengths", SEQUENCES_KEY}.isdisjoint(get_dataset_column_names(dataset))


def prepare_with_columns(
    prepare: Callable[..., Dataset | IterableDataset],
    columns: TokenColumns,
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    args: Any,
    packing: bool,
    formatting_func: Callable | None,
    dataset_name: str,
) -> Dataset | IterableDataset:
    """`SFTTrainer._prepare_dataset`, with truncation, packing and shuffling applied to the extra columns too.

    Args:
        prepare: TRL's own `_prepare_dataset`, which here only tokenizes and builds labels.
        columns: the columns to keep. The other arguments are those of `_prepare_dataset`.
    """
    if columns.weights is not None:
        check_column(columns.weights, {dataset_name: dataset})
    plain = copy.copy(args)
    plain.max_length, plain.shuffle_dataset = None, False
    if columns.cache is not None:
        check_tokens(columns.cache, processing_class)
    dataset = prepare(dataset, processing_class, plain, False, formatting_func, dataset_name)
    token_columns = ["input_ids", "labels"] + ([columns.weights] if columns.weights is not None else [])
    if columns.cache is not None:
        dataset = _with_places(dataset, args, packing, columns.cache, dataset_name)
        token_columns.append(PLACES_KEY)

    with main_first():
        if columns.weights is not None:
            dataset = _map(dataset, args, _checked(columns.weights), f"Checking weights of {dataset_name} dataset")
        if packing:
            return _pack(dataset, args, columns, token_columns, dataset_name)
        if args.max_length is not None:
            dataset = _map(dataset, args, _truncation(args, token_columns), f"Truncating {dataset_name} dataset")
            dataset = dataset.filter(lambda example: any(label != IGNORE_INDEX for label in example["labels"]))
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


@contextmanager
def main_first() -> Iterator[None]:
    """As TRL does it: once where all processes share a cache of data, else once per node; the others read the cache.

    Where the first ones raise, the others have their turn all the same, and find it by themselves.
    """
    state = PartialState()
    for waits in (not state.is_main_process, not state.is_local_main_process):
        if waits:
            state.wait_for_everyone()
    try:
        yield
    finally:
        for waited in (not state.is_local_main_process, not state.is_main_process):
            if not waited:
                state.wait_for_everyone()


def _map(dataset: Dataset | IterableDataset, args: Any, function: Callable, description: str) -> Any:
    if isinstance(dataset, Dataset):
        return dataset.map(function, with_indices=True, num_proc=args.dataset_num_proc, desc=description)
    return dataset.map(function, with_indices=True)


def check_tokens(cache: PriorCache, processing_class: Any) -> None:
    """Raise unless a cache was made with the tokens that are trained on."""
    found = tokenizer_fingerprint(processing_class)
    if found != cache.manifest.tokenizer:
        raise ValueError(
            f"`prior_cache`: {cache.directory} was made with other tokens (fingerprint {cache.manifest.tokenizer}) "
            f"than those of the `processing_class` ({found}): make it again with this tokenizer."
        )


def _with_places(
    dataset: Dataset | IterableDataset, args: Any, packing: bool, cache: PriorCache, name: str
) -> Dataset | IterableDataset:
    """Add to every example the places of its tokens in the cache; raise where a label has none, but for the first."""
    kept = kept_by_truncation(args, packing)

    def place(example: dict[str, Any], row: int) -> dict[str, Any]:
        places, labels = cache.places(example["input_ids"]), [IGNORE_INDEX, *example["labels"][1:]]
        pairs = zip(places[kept], labels[kept], strict=True)
        missing = any(place < 0 and label != IGNORE_INDEX for place, label in pairs)
        if missing and streamed:
            raise ValueError(_missing(cache, f"example {row} of the {name} dataset is"))
        return {PLACES_KEY: places, "_missing": missing}

    streamed = isinstance(dataset, IterableDataset)
    with main_first():
        dataset = _map(dataset, args, place, f"Looking up {name} dataset in the cache")
    if not streamed:
        missing = [row for row, is_missing in enumerate(dataset["_missing"]) if is_missing]
        if missing:  # on every process alike
            whole = f"{len(missing)} of {len(dataset)} examples of the {name} dataset, the first of them number "
            raise ValueError(_missing(cache, f"{whole}{missing[0]}, are"))
    return dataset.remove_columns("_missing")


def kept_by_truncation(args: Any, packing: bool) -> slice:
    """The tokens of an example that may be trained on."""
    splits = packing and args.packing_strategy != "bfd"
    if args.max_length is None or splits:
        return slice(None)
    return slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)


def _missing(cache: PriorCache, which: str) -> str:
    return (
        f"`prior_cache`: {which} not in {cache.directory}, or with fewer labels or tokens: run `trl-qtarget cache` "
        "with this recipe and the same `output_dir`, which adds what is missing."
    )


def _checked(column: str) -> Callable:
    def check(example: dict[str, Any], row: int) -> dict[str, Any]:
        return {column: check_weights(example[column], len(example["input_ids"]), column, row)}

    return check


def _truncation(args: Any, token_columns: list[str]) -> Callable:
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"`truncation_mode={args.truncation_mode!r}` is unknown: use 'keep_start' or 'keep_end'.")
    kept = slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)

    def truncate(example: dict[str, Any], row: int) -> dict[str, Any]:
        return {column: example[column][kept] for column in token_columns}

    return truncate


def _pack(
    dataset: Dataset | IterableDataset, args: Any, columns: TokenColumns, token_columns: list[str], name: str
) -> Dataset | IterableDataset:
    if args.max_length is None:
        raise ValueError("`max_length=None` leaves packing without a length to pack to: set `max_length`.")
    if columns.documents:

        def number(example: dict[str, Any], row: int) -> dict[str, Any]:
            return {SEQUENCES_KEY: [row] * len(example["input_ids"])}

        dataset = _map(dataset, args, number, f"Numbering documents of {name} dataset")
        token_columns = [*token_columns, SEQUENCES_KEY]
    dataset = dataset.select_columns(token_columns)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    options = {"num_proc": args.dataset_num_proc, "desc": f"Packing {name} dataset"}
    dataset = pack_dataset(
        dataset, args.max_length, args.packing_strategy, options if isinstance(dataset, Dataset) else None
    )
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


@dataclass
class TokenColumnCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with per-token columns padded or flattened exactly as the labels are."""

    columns: TokenColumns = field(default_factory=TokenColumns)
    reads_cache: bool = True  # else a batch has the places, for who reads after the batch was split

    @classmethod
    def extending(cls, collator: DataCollatorForLanguageModeling, columns: TokenColumns) -> "TokenColumnCollator":
        """The same collator with columns."""
        own = {item.name: getattr(collator, item.name) for item in fields(DataCollatorForLanguageModeling)}
        return cls(**own, columns=columns)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for column, key in self.columns.keys().items():
            if column in examples[0]:
                batch[key] = self._collate(column, examples, batch["labels"])
        if PLACES_KEY in examples[0]:
            places = batch.pop(ROWS_KEY)
            # The first token of a document, which another one precedes in a packed row: nothing is known of it.
            batch["labels"] = batch["labels"].masked_fill(places < 0, IGNORE_INDEX)
            batch |= {ROWS_KEY: self.columns.cache.read(places)} if self.reads_cache else {PLACES_KEY: places}
        return batch

    def _collate(self, column: str, examples: list[dict[str, Any]], labels: Tensor) -> Tensor:
        dtype = torch.float32 if column == self.columns.weights else torch.long
        rows = [torch.as_tensor(example[column], dtype=dtype) for example in examples]
        for row, example in zip(rows, examples, strict=True):
            if len(row) != len(example["input_ids"]):
                raise ValueError(
                    f"`{column}` has {len(row)} entries for {len(example['input_ids'])} tokens: a dataset that skips "
                    "preparation must bring one entry per token."
                )
            if dtype.is_floating_point and not (torch.isfinite(row) & (row >= 0)).all():
                raise ValueError(f"`{column}` has a weight that is negative, NaN or infinite: use weights >= 0.")
        rows = [torch.cat(rows)] if self.padding_free else rows
        out = torch.full(labels.shape, -1 if column == PLACES_KEY else 0, dtype=dtype)
        for index, row in enumerate(rows):
            out[index, : len(row)] = row
        return out
