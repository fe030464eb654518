"""Processes that write a cache together and are killed on the way leave the bytes of one that was left alone."""

import multiprocessing
import time
from pathlib import Path

import cache_writers
import pytest
import torch
from safetensors.torch import load_file

from trl_qtarget.priors import store_writer
from trl_qtarget.priors.store import Manifest, PriorCache


def start(folder: Path) -> multiprocessing.Process:
    # By fork, which imports nothing again.
    writer = multiprocessing.get_context("fork").Process(target=cache_writers.main, args=(folder, 0.1))
    writer.start()
    return writer


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-*.safetensors")}


def test_two_writers_killed_three_times_leave_what_one_writes(tmp_path):
    cache_writers.main(tmp_path / "once", 0.0)
    folder = tmp_path / "killed"
    writers = [start(folder), start(folder)]
    deadline = time.monotonic() + 120
    for victim in (0, 1, 0):
        before = len(shards(folder))
        while len(shards(folder)) < before + 2:
            assert time.monotonic() < deadline, "nothing is being written"
            time.sleep(0.02)
        writers[victim].kill()  # SIGKILL, at whatever it was doing
        writers[victim].join()
        writers[victim] = start(folder)
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert shards(folder) == shards(tmp_path / "once")
    cache = PriorCache(folder)
    cache.check_sums()
    assert len(cache) == len(cache_writers.EXAMPLES)


def test_what_a_killed_writer_has_begun_is_no_shard(tmp_path):
    cache_writers.main(tmp_path, 0.0)
    whole = shards(tmp_path)
    name = sorted(whole)[0]
    (tmp_path / f".{name[:16]}.killed").write_bytes(whole[name][:50])
    (tmp_path / name).unlink()
    assert len(PriorCache(tmp_path)) < len(cache_writers.EXAMPLES)
    cache_writers.main(tmp_path, 0.0)
    assert shards(tmp_path) == whole and not list(tmp_path.glob(".*.killed"))


def test_without_locks_the_same_is_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(store_writer.FileLock, "acquire", refuse)
    cache_writers.main(tmp_path / "unlocked", 0.0)
    monkeypatch.undo()
    cache_writers.main(tmp_path / "locked", 0.0)
    assert shards(tmp_path / "unlocked") == shards(tmp_path / "locked")


def test_rows_are_read_from_the_shard_they_are_in(tmp_path):
    cache_writers.main(tmp_path, 0.0)
    cache = PriorCache(tmp_path)
    assert len(cache.names) > 3
    for number, name in enumerate(cache.names):
        tensors = load_file(tmp_path / name)
        first = int(cache._offsets[number])
        rows = cache.read(torch.arange(first, first + len(tensors["ids"])))
        assert torch.equal(rows[:, :2], tensors["ids"])
        assert torch.equal(rows[:, 2:4].view(torch.float32), tensors["log_probs"])
        assert torch.equal(rows[:, 4].view(torch.float32), tensors["label_log_probs"])
        assert torch.equal(rows[:, 5].view(torch.float32), tensors["rest_log_mass"])
    mixed = cache.read(torch.tensor([[0, -1], [int(cache._offsets[-1]) - 1, 0]]))
    assert mixed.shape == (2, 2, 6) and not mixed[0, 1].any() and torch.equal(mixed[0, 0], mixed[1, 1])


def test_the_first_manifest_stays(tmp_path):
    store_writer.begin(tmp_path, cache_writers.MANIFEST)
    other = Manifest(**{**vars(cache_writers.MANIFEST), "package": "another version"})
    store_writer.begin(tmp_path, other)  # says the same
    with pytest.raises(ValueError, match=r"`output_dir`: .* holds another cache, whose `dtype` is 'float32'"):
        store_writer.begin(tmp_path, Manifest(**{**vars(other), "dtype": "bfloat16"}))
    assert Manifest.load(tmp_path) == cache_writers.MANIFEST and not list(tmp_path.glob(".manifest*"))
    (tmp_path / "manifest.json").write_text('{"version": 7}')
    with pytest.raises(ValueError, match="its format is 7, and this version of the package reads 1"):
        PriorCache(tmp_path)
