"""A checkpoint holds the whole state of one run; what died while it was written, or lacks a part, is not resumed."""

from pathlib import Path

import pytest
import tiny
from peft import LoraConfig
from training import make_trainer, warm_model

from trl_qtarget import QTargetConfig, QTargetSFTTrainer, last_whole_checkpoint


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
LAGGED = QTargetConfig("psft", prior_sync_steps=2)
STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def trainer(directory: Path, cls: type = QTargetSFTTrainer, steps: int = 3, method="sft", **arguments):
    options = {"output_dir": str(directory), "save_strategy": "steps", "save_steps": 3}
    return make_trainer(
        cls,
        tiny.text_dataset(),
        warm_model(),
        steps=steps,
        optim="adamw",
        qtarget_config=method,
        options=options | arguments.pop("options", {}),
        **arguments,
    )


def dying(moment: str) -> type:
    """A trainer that dies when it has done a part of its first checkpoint."""

    def die(self, *args, **kwargs):
        getattr(QTargetSFTTrainer, moment)(self, *args, **kwargs)
        raise KeyboardInterrupt

    return type("Dying", (QTargetSFTTrainer,), {moment: die})


@pytest.mark.parametrize("moment", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_checkpoint_that_a_dying_run_rewrote_is_not_whole(moment, tmp_path):
    """Else it would be the new run's weights with the old one's optimiser."""
    trainer(tmp_path).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert last_whole_checkpoint(tmp_path) == str(checkpoint)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, dying(moment), method="dft").train()
    assert last_whole_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="`resume_from_checkpoint` names an interrupted checkpoint"):
        trainer(tmp_path, method="dft").train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_of_another_run_leaves_nothing_of_its_state(tmp_path):
    """A run that saves weights only, over one that saved all: the optimiser and the prior would be the old one's."""
    trainer(tmp_path, method=LAGGED).train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "mine.txt").write_text("of the user")
    assert all((checkpoint / name).is_file() for name in (*STATE, "qtarget_prior.safetensors"))
    trainer(tmp_path, options={"save_only_model": True}).train()
    left = {path.name for path in checkpoint.iterdir()}
    assert left & {*STATE, "qtarget_prior.safetensors"} == {"trainer_state.json"}
    assert {"model.safetensors", "mine.txt"} <= left


MISSING = {
    "optimizer.pt": "without the optimiser: ",
    "scheduler.pt": "without the learning rate's schedule: ",
    "rng_state.pth": "without the random numbers: ",
}


@pytest.mark.parametrize("name", MISSING)
def test_resume_without_a_part_of_the_state_is_refused(name, tmp_path):
    trainer(tmp_path).train()
    (tmp_path / "checkpoint-3" / name).unlink()
    with pytest.raises(ValueError, match=MISSING[name]):
        trainer(tmp_path, steps=6).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", LAGGED], ids=["sft", "lagged"])
def test_resume_from_weights_alone_is_refused(method, peft, tmp_path):
    trainer(tmp_path, method=method, peft_config=peft, options={"save_only_model": True}).train()
    resumed = trainer(tmp_path, method=method, peft_config=peft, steps=6)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` names a checkpoint without the optimiser") as error:
        resumed.train(resume_from_checkpoint=True)
    assert "the random numbers" in str(error.value) and "`save_only_model=True`" in str(error.value)
    assert "another prior" not in str(error.value) and f"(`model='{tmp_path / 'checkpoint-3'}'`)" in str(error.value)
