"""A refusal is one on every rank: none waits for another that has raised."""

import pytest
from launch import outcomes_of
from refused import CASES, SPLIT_CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of("refused.py", tmp_path_factory.mktemp("refused"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_refused_on_both_ranks(name, outcomes):
    one, other = outcomes[name]
    assert one.startswith("refused: ") and one == other


@pytest.fixture(scope="module")
def split_outcomes(tmp_path_factory):
    return outcomes_of("refused.py", tmp_path_factory.mktemp("refused"), "sp2-zero3")


@pytest.mark.distributed
@pytest.mark.parametrize("words", SPLIT_CASES)
def test_refused_on_both_ranks_of_a_row(words, split_outcomes):
    one, other = split_outcomes[words]
    assert one.startswith("refused: ") and words in one and one == other
