"""Sequences that lie on two ranks: their loss is that of one process."""

import pytest
from launch import outcomes_of
from pieces import CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of("pieces.py", tmp_path_factory.mktemp("pieces"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_pieces(name, outcomes):
    assert outcomes[name] == ""
