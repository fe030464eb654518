"""What the package relies on inside DeepSpeed, FSDP2 and Accelerate's FSDP: one test each, run by two ranks."""

import json
from pathlib import Path

import pytest
from launch import finish, start, torchrun
from sharded_contracts import CONTRACTS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contracts")
    script = str(Path(__file__).parents[1] / "support" / "sharded_contracts.py")
    log = folder / "log.txt"
    finish(start([*torchrun(), script, str(folder / "outcomes.json")], log), log)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("name", [contract.__name__ for contract in CONTRACTS])
def test_sharded(name, outcomes):
    assert outcomes[name] == ""
