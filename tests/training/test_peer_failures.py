"""Failures reported of other trainers that no other test here would catch; docs/peer_failures.md lists them all."""

import pytest
import tiny
import torch
from training import (
    DENSE_TOLERANCE,
    SAME,
    check_equals_dense,
    first_batch,
    loss_and_gradients,
    make_trainer,
    other_model,
    train_target,
    warm_model,
)

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


def trainer_of(method, dataset=None, **arguments) -> QTargetSFTTrainer:
    dataset = tiny.text_dataset() if dataset is None else dataset
    return make_trainer(QTargetSFTTrainer, dataset, warm_model(), qtarget_config=method, **arguments)


@torch.no_grad()
def tokens_of(trainer, batch):
    """What the loss says of every position of a batch, in evaluation mode."""
    inputs = dict(batch)
    request = trainer.target_request(inputs)
    return trainer.model.eval()(**inputs, qtarget=request).tokens


# --- normalisation ---


def test_evaluation_loss_does_not_know_accumulation():
    def evaluated(**options):
        trainer = trainer_of("asft", ref_model=other_model(), eval_dataset=tiny.text_dataset(8, 3), options=options)
        return trainer.evaluate()["eval_loss"]

    assert evaluated(gradient_accumulation_steps=8) == pytest.approx(evaluated(), rel=SAME)


LAYOUTS = {
    "padded": ({}, tiny.text_dataset),
    "completion_only": ({}, tiny.prompt_dataset),
    "packed": ({"packing": True, "max_length": 48}, tiny.text_dataset),
    "packed_completion_only": ({"packing": True, "max_length": 48}, tiny.prompt_dataset),
    "wrapped": ({"packing": True, "packing_strategy": "wrapped", "max_length": 24}, tiny.text_dataset),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_that_are_counted_are_those_that_are_scored(name):
    """The loss is a sum divided by a count that the trainer takes elsewhere: both must mean the same tokens."""
    options, dataset = LAYOUTS[name]
    trainer = trainer_of("sft", dataset(), options=options)
    batch = first_batch(trainer)
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    tokens = tokens_of(trainer, batch)
    assert count == tokens.scored.sum()
    assert tokens.loss.item() == pytest.approx(tokens.nll.sum().item() / int(count), rel=SAME)


# --- the teacher ---


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 48}], ids=["padded", "packed"])
@pytest.mark.parametrize("method", ["distill", QTargetConfig("distill_hybrid", lam=1.0)], ids=["distill", "hybrid"])
def test_policy_that_is_its_own_teacher_has_nothing_to_learn(method, options):
    """A teacher that is one position off would still teach."""
    own, other = (
        loss_and_gradients(trainer, first_batch(trainer))[1]
        for trainer in (
            trainer_of(method, ref_model=model, options=options) for model in (warm_model(), other_model())
        )
    )
    size = max(value.abs().max() for value in other.values())
    assert max(value.abs().max() for value in own.values()) < 1e-6 * size


@pytest.mark.parametrize("method", ["distill", "distill_hybrid"])
def test_temperature_of_the_configuration_reaches_the_loss(method):
    run = train_target(QTargetConfig(method, temperature=3.0), ref_model=other_model(), steps=1)
    check_equals_dense(run.trainer, other_model())
    plain = train_target(method, ref_model=other_model(), steps=1)
    assert run.column("loss") != pytest.approx(plain.column("loss"), rel=1e-2)


# --- packing ---


@pytest.mark.parametrize("method", ["sft", "asft", "iw_sft", "target_sft"])
def test_document_of_a_packed_row_is_deaf_to_the_one_before(method):
    """Neither its tokens nor the prior's opinion of them change, and nothing is asked of its first token."""
    arguments = {} if method == "sft" else {"ref_model": other_model()}
    trainer = trainer_of(method, options={"packing": True, "max_length": 48}, **arguments)
    batch = first_batch(trainer)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    first, second, end = starts[0].item(), starts[1].item(), starts[2].item()
    changed = dict(batch, input_ids=batch["input_ids"].clone(), labels=batch["labels"].clone())
    for name in ("input_ids", "labels"):
        changed[name][0, first + 1 : second] = 7  # another text of the same length
    before, after = tokens_of(trainer, batch), tokens_of(trainer, changed)
    assert not before.scored[second - 1]  # the position that would predict the second document's first token
    for name in ("nll", "trust", "label_mass", "kl"):
        one, other = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(other[second:end], one[second:end], rtol=DENSE_TOLERANCE, atol=1e-6, equal_nan=True)
    assert not torch.allclose(before.nll[first:second], after.nll[first:second])
