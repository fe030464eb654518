"""Sums of what is logged: of one size for any number of steps, and in a dtype that the device has."""

import gc

import pytest
import tiny
import torch
from training import make_trainer, train_target, warm_model
from transformers import TrainerCallback

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.training.metrics import sums_dtype


class Count(TrainerCallback):
    """Tensors alive after some steps."""

    def __init__(self):
        self.alive = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (20, 60):
            gc.collect()
            self.alive.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))


@pytest.mark.parametrize("model", [tiny.model, tiny.moe_model], ids=["dense", "moe"])
def test_memory_does_not_grow_without_a_log(model):
    count = Count()
    train_target("dft", model=model(), steps=61, callbacks=[count], options={"logging_strategy": "no"})
    after_20, after_60 = count.alive
    assert after_60 <= after_20 + 4  # one tensor in each of 40 steps would make 40


def test_memory_does_not_grow_while_predicting():
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="dft")
    kept = []
    for _ in range(2):
        trainer.predict(trainer.train_dataset)
        gc.collect()
        kept.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert kept[1] <= kept[0] + 1


def test_sums_are_float64_where_the_device_surely_has_it():
    assert sums_dtype(torch.device("cpu")) == sums_dtype(torch.device("cuda", 1)) == torch.float64
    for device in ("mps", "xpu"):
        assert sums_dtype(torch.device(device)) == torch.float32
