"""`test_split_size`: which rows are held out, of a dataset, of a stream and of a mixture."""

import json

import pytest
from datasets import IterableDataset, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from trl_qtarget.cli.data import load_data


ROWS = [{"text": f"row {number}"} for number in range(40)]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def loaded(path: str, size: float | None, mixture: bool, streaming: bool, **names) -> dict[str, list]:
    if mixture:
        config = DatasetMixtureConfig([DatasetConfig(path)], streaming=streaming, test_split_size=size)
        parts = load_data(ScriptArguments(), config)
    else:
        script = ScriptArguments(path, dataset_streaming=streaming, **names)
        parts = load_data(script, DatasetMixtureConfig(test_split_size=size))
    assert all(isinstance(rows, IterableDataset) == streaming for rows in parts.values())
    return {name: list(rows) for name, rows in parts.items()}


@pytest.mark.parametrize("size", [1, 7, 7.0, 39])
@pytest.mark.parametrize("mixture", [False, True])
def test_first_rows_of_a_stream_are_held_out(path, size, mixture):
    for _ in range(2):  # a stream is read again in every evaluation
        parts = loaded(path, size, mixture, streaming=True)
        assert parts == {"train": ROWS[int(size) :], "test": ROWS[: int(size)]}


@pytest.mark.parametrize("mixture", [False, True])
def test_share_of_a_stream_is_refused(path, mixture):
    with pytest.raises(ValueError, match=r"`test_split_size=0\.25` is a share of a stream.*give a number of rows"):
        loaded(path, 0.25, mixture, streaming=True)


@pytest.mark.parametrize(("size", "held_out"), [(0.25, 10), (10, 10), (10.0, 10), (1, 1)])
@pytest.mark.parametrize("mixture", [False, True])
def test_same_rows_are_held_out_everywhere(path, size, held_out, mixture):
    """Each process splits for itself; where two differ, one would train on what the other holds out."""
    parts = loaded(path, size, mixture, streaming=False)
    assert len(parts["test"]) == held_out
    assert sorted(parts["train"] + parts["test"], key=ROWS.index) == ROWS
    assert loaded(path, size, mixture, streaming=False) == parts


def test_size_that_leaves_nothing_is_refused(path):
    with pytest.raises(ValueError, match=r"`test_split_size=40` leaves nothing to train on: the dataset has 40 rows"):
        loaded(path, 40, False, streaming=False)


@pytest.mark.parametrize("size", [0, -1, 1.5, float("nan"), float("inf"), True, "half", [1]])
@pytest.mark.parametrize("mixture", [False, True])
def test_what_is_no_size(path, size, mixture):
    with pytest.raises(ValueError, match=r"`test_split_size=.*` is no size: it must be a share"):
        loaded(path, size, mixture, streaming=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_other_names(path, tmp_path, streaming):
    assert loaded(path, 3, False, streaming, dataset_test_split="held").keys() == {"train", "held"}
    with pytest.raises(ValueError, match="`dataset_train_split='trian'` is no split of the dataset: choose one of"):
        loaded(path, 3, False, streaming, dataset_train_split="trian")


def test_given_test_split_is_kept(path, tmp_path):
    (tmp_path / "both").mkdir()
    dataset = load_dataset("json", data_files=path)["train"]
    for name, rows in (("train", range(30)), ("test", range(30, 40))):
        dataset.select(rows).to_json(str(tmp_path / "both" / f"{name}.jsonl"))
    assert loaded(str(tmp_path / "both"), 3, False, streaming=False)["test"] == ROWS[30:]
