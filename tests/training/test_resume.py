"""A run that resumes goes on as if it had never stopped, and checkpoints say toward which target they were trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from peft import LoraConfig
from safetensors.torch import load_file
from training import SAME, Run, make_trainer, trainable, warm_model, worst
from transformers import TrainerCallback

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
STATE = "qtarget_prior.safetensors"
CONFIG = "qtarget_config.json"

CASES = {
    "lagged": {"qtarget_config": QTargetConfig("psft", prior_sync_steps=2)},
    "lagged_average": {
        "qtarget_config": QTargetConfig("asft", prior="lagged", prior_sync_steps=1, prior_sync_decay=0.5)
    },
    "lagged_lora": {"qtarget_config": QTargetConfig("psft", prior_sync_steps=2), "peft_config": LORA},
    "base": {"qtarget_config": QTargetConfig("asft")},
    "base_lora": {"qtarget_config": QTargetConfig("asft"), "peft_config": LORA},
    "ref": {"qtarget_config": "distill"},
}


class Begin(TrainerCallback):
    """The step at which a run begins."""

    step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def run(directory, resume=None, allow_new_target=False, **arguments) -> Run:
    """Six steps with a checkpoint after the third, or the last three of them."""
    if arguments["qtarget_config"] == "distill":
        arguments["ref_model"] = warm_model(steps=12)
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model(),
        steps=6,
        optim="adamw",
        options={"output_dir": str(directory), "save_strategy": "steps", "save_steps": 3},
        **arguments,
    )
    result = Run(trainer, trainable(trainer.model))
    resume = str(resume) if isinstance(resume, Path) else resume
    trainer.train(resume_from_checkpoint=resume, allow_new_target=allow_new_target)
    return result


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_uninterrupted_run(case, tmp_path):
    whole = run(tmp_path / "whole", **CASES[case])
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-3", **CASES[case])
    assert len(resumed.steps) == len(whole.steps) == 6
    for name in ("loss", "grad_norm", "target/trust", "target/kl"):
        assert resumed.column(name) == pytest.approx(whole.column(name), rel=1e-5), name
    assert worst(resumed.weights, whole.weights) < SAME
    assert worst(whole.weights, whole.start) > 1e-3
    saved = tmp_path / "whole" / "checkpoint-3" / STATE
    assert saved.is_file() == case.startswith("lagged")
    if saved.is_file():
        assert load_file(saved).keys() == whole.weights.keys()
        assert worst(resumed.trainer._prior.parts, whole.trainer._prior.parts) < SAME


def test_resume_without_the_lagged_weights_is_refused(tmp_path):
    run(tmp_path, qtarget_config=QTargetConfig("psft", prior_sync_steps=2))
    (tmp_path / "checkpoint-3" / STATE).unlink()
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` has no `qtarget_prior.safetensors`"):
        run(tmp_path, resume=tmp_path / "checkpoint-3", qtarget_config=QTargetConfig("psft", prior_sync_steps=2))


def test_resume_with_other_parameters_is_refused(tmp_path):
    psft = QTargetConfig("psft", prior_sync_steps=2)
    run(tmp_path / "full", qtarget_config=psft)
    run(tmp_path / "lora", qtarget_config=psft, peft_config=LORA)
    saved = (tmp_path / "full" / "checkpoint-3" / STATE).read_bytes()
    (tmp_path / "lora" / "checkpoint-3" / STATE).write_bytes(saved)
    with pytest.raises(ValueError, match="holds other parameters than those being trained"):
        run(tmp_path / "lora", resume=tmp_path / "lora" / "checkpoint-3", qtarget_config=psft, peft_config=LORA)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_checkpoints_and_saved_models_hold_the_config(peft, tmp_path):
    config = QTargetConfig("asft", lam=0.03)
    result = run(tmp_path, qtarget_config=config, peft_config=peft)
    result.trainer.save_model()
    result.trainer.save_model(str(tmp_path / "elsewhere"))
    for directory in ("checkpoint-3", "checkpoint-6", ".", "elsewhere"):
        found = QTargetConfig.from_pretrained(tmp_path / directory)
        assert found == replace(config, prior="base")
        written = json.loads((tmp_path / directory / CONFIG).read_text())
        assert written.pop("provenance")["prior"] and written == found.to_dict()
    assert not [path for path in tmp_path.rglob(".*") if "qtarget" in path.name]


# --- which checkpoint ---


def test_resume_toward_another_target_is_refused_unless_said(tmp_path):
    run(tmp_path, qtarget_config="sft")
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(
        ValueError, match=r"`qtarget_config` \(`method='dft'`\) is not the target .*`method='sft'`"
    ) as error:
        run(tmp_path / "resumed", resume=checkpoint, qtarget_config="dft")
    assert "differ in method" in str(error.value) and "allow_new_target=True" in str(error.value)
    resumed = run(tmp_path / "resumed", resume=checkpoint, allow_new_target=True, qtarget_config="dft")
    assert QTargetConfig.from_pretrained(tmp_path / "resumed" / "checkpoint-6") == QTargetConfig("dft")
    assert len(resumed.steps) == 6


def test_resume_with_another_knob_is_refused(tmp_path):
    run(tmp_path, qtarget_config=QTargetConfig("beyond_log", alpha=0.5))
    with pytest.raises(ValueError, match="they differ in alpha"):
        run(tmp_path, resume=tmp_path / "checkpoint-3", qtarget_config="beyond_log")


def test_resume_with_the_same_target_in_other_words(tmp_path):
    run(tmp_path, qtarget_config=QTargetConfig("beyond_log", alpha=1.0))
    same = QTargetConfig("beyond_log", chunk_tokens=5)
    assert len(run(tmp_path, resume=tmp_path / "checkpoint-3", qtarget_config=same).steps) == 6


def test_resume_from_a_checkpoint_of_plain_sft(tmp_path):
    run(tmp_path, qtarget_config="sft")
    (tmp_path / "checkpoint-3" / CONFIG).unlink()
    assert len(run(tmp_path, resume=tmp_path / "checkpoint-3", qtarget_config="dft").steps) == 6


@pytest.mark.parametrize("text", [None, '{"global_step": 6, "log_his'], ids=["missing", "half"])
def test_resume_passes_over_an_interrupted_checkpoint(text, tmp_path):
    run(tmp_path, qtarget_config="sft")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.unlink() if text is None else state.write_text(text)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` names an interrupted checkpoint"):
        run(tmp_path, resume=tmp_path / "checkpoint-6", qtarget_config="sft")
    begin = Begin()
    resumed = run(tmp_path, resume=True, qtarget_config="sft", callbacks=[begin])
    assert begin.step == 3 and len(resumed.steps) == 6


def test_resume_without_a_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint=True` finds no whole checkpoint"):
        run(tmp_path, resume=True, qtarget_config="sft")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="`resume_from_checkpoint=True` finds no whole checkpoint"):
        run(tmp_path, resume=True, qtarget_config="sft")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` names no folder"):
        run(tmp_path, resume=tmp_path / "nowhere", qtarget_config="sft")
