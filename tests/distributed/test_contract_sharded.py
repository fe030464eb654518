"""What the package relies on inside DeepSpeed, FSDP2 and Accelerate's FSDP: one test each, run by two ranks."""

import pytest
from launch import outcomes_of
from sharded_contracts import CONTRACTS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of("sharded_contracts.py", tmp_path_factory.mktemp("contracts"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [contract.__name__ for contract in CONTRACTS])
def test_sharded(name, outcomes):
    assert outcomes[name] == ""
