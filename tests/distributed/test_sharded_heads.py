"""A head's gradient is that of one process wherever it stands among shards: alone, with others, tied, wrapped."""

import json
from pathlib import Path

import pytest
from launch import finish, start, torchrun
from sharded_heads import CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    script = str(Path(__file__).parents[1] / "support" / "sharded_heads.py")
    log = folder / "log.txt"
    finish(start([*torchrun(), script, str(folder / "outcomes.json")], log), log)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_sharded_head(name, outcomes):
    assert outcomes[name] == ""
