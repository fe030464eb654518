"""The loss is the mean over the labels that are scored, whatever the model's class, and however a step is divided."""

import pytest
import tiny
import tiny_vision
from cells import Stranger
from datasets import Dataset
from training import SAME, make_trainer, train_target, warm_model, worst

from trl_qtarget import QTargetSFTTrainer


def stranger():
    model = warm_model()
    model.__class__ = Stranger
    return model


def of_family(name: str):
    """A class that sees, on text alone; and its rows have other numbers of labels still."""
    family = tiny_vision.FAMILIES[name]
    return lambda: family.model()


CLASSES = {
    "llama": warm_model,
    "stranger": stranger,
    "gemma3": of_family("gemma3"),
    "qwen2_5_vl": of_family("qwen2_5_vl"),
    "qwen3_vl_moe": of_family("qwen3_vl_moe"),
}


def uneven() -> Dataset:
    """Four rows: three with one label each, one with many."""
    tokens = tiny.tokenizer()(tiny.sentences(4, seed=3, longest=20))["input_ids"]
    rows = [row[:3] for row in tokens[:3]] + [tokens[3] * 3]
    labels = [[-100] * (len(row) - 1) + row[-1:] for row in rows[:3]] + [[-100, *rows[3][1:]]]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


BATCH = {"per_device_train_batch_size": 4}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
# float32: each side sums the same four gradients in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", CLASSES)
def test_accumulation_is_the_batch_for_every_class(name):
    """Of classes with `accepts_loss_kwargs = False`, transformers would average each micro-batch by itself."""
    options = {"max_grad_norm": 0.0, "router_aux_loss_coef": 0.0}
    one, other = (
        train_target("sft", uneven(), CLASSES[name](), steps=1, options=options | layout)
        for layout in (BATCH, ONE_BY_ONE)
    )
    assert other.column("loss") == pytest.approx(one.column("loss"), rel=TOLERANCE)
    assert one.column("loss") == pytest.approx(one.column("target/nll"), rel=TOLERANCE)
    ways = [{key: run.weights[key] - run.start[key] for key in run.start} for run in (one, other)]
    moved = {key for key, way in ways[0].items() if way.abs().max() > 0}
    assert moved
    way, truth = ({key: each[key] for key in moved} for each in reversed(ways))
    assert worst(way, truth) < TOLERANCE


@pytest.mark.parametrize("name", ["stranger", "gemma3"])
def test_evaluation_knows_neither_class_nor_accumulation(name):
    def evaluated(**options):
        trainer = make_trainer(
            QTargetSFTTrainer,
            uneven(),
            CLASSES[name](),
            qtarget_config="sft",
            eval_dataset=uneven(),
            options=options,
        )
        return trainer.evaluate()

    plain, accumulated = evaluated(), evaluated(gradient_accumulation_steps=8)
    assert accumulated["eval_loss"] == pytest.approx(plain["eval_loss"], rel=SAME)
    assert plain["eval_loss"] == pytest.approx(plain["eval_target/nll"], rel=SAME)  # one batch
