"""The data that a command names: datasets and mixtures, on the hub or in local files."""

import logging
import math
import os
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig, get_dataset


logger = logging.getLogger("trl_qtarget")

# Loaders of `datasets`, by the ending of a local file.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def check_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> None:
    """Raise unless a dataset or a mixture is named whose files exist, and `test_split_size` is a size."""
    size = mixture.test_split_size
    number = size if isinstance(size, int | float) and not isinstance(size, bool) else math.nan
    if size is not None and not 0 < number < 1 and not (1 <= number < math.inf and number == int(number)):
        raise ValueError(
            f"`test_split_size={size!r:.60}` is no size: it must be a share in (0, 1), or a whole number of rows."
        )
    if not mixture.datasets and script.dataset_name is None:
        raise ValueError("`dataset_name` is missing: name a dataset or a local file, or a mixture in `datasets`.")
    for name in [each.path for each in mixture.datasets] or [script.dataset_name]:
        local_format(name)


def check_format(dataset: DatasetDict | IterableDatasetDict, training: SFTConfig) -> None:
    """Raise unless the columns are those of a format that is trained on; where they are known before the first row."""
    formats = {"messages"}, {"conversations"}, {"prompt", "completion"}, {training.dataset_text_field}, {"input_ids"}
    for rows in dataset.values():
        columns = rows.column_names
        if columns is None or any(each <= set(columns) for each in formats):
            continue
        alpaca = " Of Alpaca's columns, `instruction` with `input` is the prompt and `output` the completion."
        raise ValueError(
            f"the dataset has the columns {', '.join(f'`{name}`' for name in columns)}, which are no format to train "
            f"on: it needs `messages`, or `prompt` and `completion`, or `{training.dataset_text_field}` "
            "(`--dataset_text_field` names another), or `input_ids`."
            + (alpaca if {"instruction", "output"} <= set(columns) else "")
        )


def load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """The dataset or the mixture, from the hub, from folders or from local files.

    `test_split_size` makes the test split where there is none: a share or a number of rows, chosen by a fixed seed; of
    a stream, its first rows, and the rest is trained on.

    Raises:
        ValueError: neither is named, a file does not exist, or `test_split_size` does not fit.
    """
    check_data(script, mixture)
    if mixture.datasets:
        if script.dataset_name:
            logger.warning("`dataset_name` is ignored: the mixture in `datasets` is used.")
        for each in mixture.datasets:
            if loader := local_format(each.path):
                each.path, each.data_files = loader, each.path
        # Not split by TRL: it cannot split a stream, and would on each process choose other rows.
        dataset, train, test = get_dataset(replace(mixture, test_split_size=None)), "train", "test"
    else:
        name, streaming = script.dataset_name, script.dataset_streaming
        if loader := local_format(name):
            dataset = load_dataset(loader, data_files=name, streaming=streaming)
        else:
            dataset = load_dataset(name, name=script.dataset_config, streaming=streaming)
        train, test = script.dataset_train_split, script.dataset_test_split
    if mixture.test_split_size is None or test in dataset:
        return dataset
    return _split(split_of(dataset, train, "dataset_train_split"), mixture.test_split_size, train, test)


def _split(rows: Dataset | IterableDataset, size: float, train: str, test: str) -> DatasetDict | IterableDatasetDict:
    if isinstance(rows, IterableDataset):
        if size < 1:
            raise ValueError(
                f"`test_split_size={size}` is a share of a stream, whose length is not known: give a number of rows, "
                "which are the first ones, or do not stream."
            )
        return IterableDatasetDict({train: rows.skip(int(size)), test: rows.take(int(size))})
    if size >= len(rows):
        raise ValueError(f"`test_split_size={size:g}` leaves nothing to train on: the dataset has {len(rows)} rows.")
    parts = rows.train_test_split(test_size=size if size < 1 else int(size), seed=0)
    return DatasetDict({train: parts["train"], test: parts["test"]})


def local_format(name: str) -> str | None:
    """The loader for a local file; None for a folder or a dataset on the hub.

    Raises:
        ValueError: it is no name, or can only be a file, and there is none.
    """
    if not isinstance(name, str):
        raise ValueError(f"`{name!r:.60}` is no name of a dataset: it must be a string.")
    loader = FORMATS.get(Path(name).suffix.lower())
    if os.path.isfile(name) and loader is None:
        raise ValueError(f"`{name}` has an unknown format: a dataset file ends in {', '.join(FORMATS)}.")
    if loader and not os.path.isfile(name):
        raise ValueError(f"`{name}` does not exist: check the path of the dataset file.")
    return loader


def split_of(dataset: DatasetDict | IterableDatasetDict, name: str, argument: str) -> Dataset | IterableDataset:
    """One split of a dataset.

    Raises:
        ValueError: there is no such split.
    """
    if name in dataset:
        return dataset[name]
    remedy = "" if argument == "dataset_train_split" else ", or set `test_split_size`, or `eval_strategy: no`"
    raise ValueError(f"`{argument}={name!r}` is no split of the dataset: choose one of {', '.join(dataset)}{remedy}.")
