"""The command line's reference model: neither shaped by the policy's options nor trusted for the policy's sake."""

import json
import shutil

import pytest
import tiny
import torch
from training import sft_config
from transformers import AutoModelForCausalLM

from trl_qtarget.cli.models import ReferenceArguments, load_reference


@pytest.fixture
def teacher(tmp_path):
    tiny.model(1).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


SHAPING = {
    "num_hidden_layers": {"num_hidden_layers": 1},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    "config": {"config": tiny.model(num_hidden_layers=1).config},
    "state_dict": {"state_dict": tiny.model(2).state_dict()},
    "hidden_act": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("case", SHAPING)
def test_policys_shape_is_not_the_teachers(teacher, case):
    training = sft_config(model_init_kwargs={"dtype": "float32", **SHAPING[case]})
    found = load_reference(ReferenceArguments(teacher), training)
    wanted = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():  # the same weights and operations
        torch.testing.assert_close(found.eval()(tokens).logits, wanted.eval()(tokens).logits, rtol=0, atol=0)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_teacher_runs_only_by_its_own_flag(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # nobody to ask
    mark, own = tmp_path / "mark", tmp_path / "own"
    shutil.copytree(teacher, own)
    (own / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (own / "config.json").write_text(json.dumps(config))
    training = sft_config(trust_remote_code=True, model_init_kwargs={"dtype": "float32", "trust_remote_code": True})
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_reference(ReferenceArguments(str(own)), training)
    assert not mark.exists()
    found = load_reference(ReferenceArguments(str(own), ref_trust_remote_code=True), training)
    assert type(found).__name__ == "OwnModel" and mark.exists()
    with pytest.raises(ValueError, match="`ref_trust_remote_code` says how to load a reference model"):
        ReferenceArguments(ref_trust_remote_code=True)
