"""A refusal is one on every rank: none waits for another that has raised."""

import pytest
from launch import outcomes_of
from refused import CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of("refused.py", tmp_path_factory.mktemp("refused"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_refused_on_both_ranks(name, outcomes):
    one, other = outcomes[name]
    assert one.startswith("refused: ") and one == other
