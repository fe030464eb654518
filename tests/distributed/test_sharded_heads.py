"""A head's gradient is that of one process wherever it stands among shards: alone, with others, tied, wrapped."""

import pytest
from launch import outcomes_of
from sharded_heads import CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of("sharded_heads.py", tmp_path_factory.mktemp("heads"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_sharded_head(name, outcomes):
    assert outcomes[name] == ""
