"""A run goes on with the prior that it began with, or says that it is another one."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig
from thinned import thinned
from training import make_trainer, other_model, warm_model

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors.record import RECORD_NAME, fingerprints


LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def trainer_of(directory, method="iw_sft", model=None, **arguments) -> QTargetSFTTrainer:
    return make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model() if model is None else model,
        steps=4,
        qtarget_config=method,
        options={"output_dir": str(directory), "save_strategy": "steps", "save_steps": 2},
        **arguments,
    )


def nudged(steps: int = 20):
    """One number in the last layer is another one."""
    model = warm_model(steps=steps)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[-1, -1] += 1e-3
    return model


CASES = {
    "reference": ({"ref_model": other_model}, {}),
    "another reference": ({"ref_model": other_model}, {"ref_model": lambda: warm_model(steps=13)}),
    "nearly the reference": ({"ref_model": other_model}, {"ref_model": lambda: nudged(12)}),
    "without its reference": ({"ref_model": other_model}, {"ref_model": lambda: None}),
    "with nothing but the policy": (
        {"method": "target_sft", "ref_model": other_model},
        {"method": "target_sft", "ref_model": lambda: None},
    ),
    "with a reference": ({}, {"ref_model": other_model}),
    "other base": ({"method": "asft", "peft_config": LORA}, {"model": nudged}),
    "other starting weights": ({"method": QTargetConfig("asft", prior="base")}, {"model": nudged}),
    "frozen under lagged adapters": ({"method": "psft", "peft_config": LORA}, {"model": nudged}),
}


def given(arguments: dict) -> dict:
    return {name: value() if callable(value) else value for name, value in arguments.items()}


_QUICK = ("reference", "nearly the reference", "other base")


@pytest.mark.parametrize("case", thinned(CASES, lambda case: case in _QUICK))
def test_another_prior_is_refused(case, tmp_path):
    before, after = CASES[case]
    trainer_of(tmp_path, **given(before)).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer_of(tmp_path / "same", **given(before)).train(checkpoint)
    if not after:
        return
    with pytest.raises(ValueError, match=r"the prior is not the one that .*checkpoint-2 was trained with") as error:
        trainer_of(tmp_path / "other", **given(before | after)).train(checkpoint)
    assert "allow_new_target=True" in str(error.value) and len(str(error.value)) < 900
    trainer_of(tmp_path / "other", **given(before | after)).train(checkpoint, allow_new_target=True)


def test_the_checkpoint_itself_is_no_base(tmp_path):
    trainer_of(tmp_path, QTargetConfig("asft", prior="base")).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="with other weights"):
        trainer_of(tmp_path, QTargetConfig("asft", prior="base"), checkpoint).train(checkpoint)


def test_checkpoints_of_before_are_gone_on_with(tmp_path):
    trainer_of(tmp_path).train()
    record = tmp_path / "checkpoint-2" / RECORD_NAME
    assert json.loads(record.read_text())["kind"] == "starting_copy"
    record.unlink()
    trainer_of(tmp_path).train(str(tmp_path / "checkpoint-2"))
    record.write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        trainer_of(tmp_path).train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_every_bit_counts(dtype):
    weight = torch.randint(0, 100, (700, 37), generator=torch.Generator().manual_seed(0)).to(dtype)
    first = fingerprints({"a": torch.nn.Parameter(weight, requires_grad=False)}, {})
    assert first == fingerprints({"a": torch.nn.Parameter(weight.clone(), requires_grad=False)}, {})
    changed = weight.clone().view(torch.uint8)
    changed[-3, 5] ^= 1
    others = [changed.view(dtype), weight.T.contiguous(), weight[:-1], weight.flip(0)]
    assert all(fingerprints({"a": torch.nn.Parameter(it, requires_grad=False)}, {}) != first for it in others)
