"""Vision-language models: the policy and every prior see the same images, and the loss is the one on their logits."""

import copy
import functools

import pytest
import tiny_vision
import torch
from peft import LoraConfig
from tiny_vision import FAMILIES
from training import (
    DENSE_TOLERANCE,
    SAME,
    TRL_BEFORE_1_15,
    check_equals_dense,
    dense_loss,
    first_batch,
    loss_and_gradients,
    make_trainer,
    relative_error,
    train,
    worst,
)
from trl import SFTTrainer

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


MOE = "qwen3_vl_moe"
BASE = QTargetConfig("asft", prior="base")
LAGGED = QTargetConfig("asft", prior="lagged", prior_sync_steps=2)


@functools.cache
def _start(family: str, seed: int):
    return FAMILIES[family].model(seed)


def start(family: str, seed: int = 0):
    return copy.deepcopy(_start(family, seed))


def lora(**options):
    # In the language model and in the vision tower.
    targets = r".*(q_proj|v_proj|qkv)"
    return LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **options)


def arguments(family: str, prompts: bool = False, **more):
    dataset = tiny_vision.prompt_dataset() if prompts else tiny_vision.chat_dataset()
    options = {"max_length": None, "learning_rate": 0.05} | more.pop("options", {})
    processor = FAMILIES[family].processor()
    return {"dataset": dataset, "model": start(family), "processing_class": processor, "options": options} | more


def run_target(family: str, method, **more):
    return train(QTargetSFTTrainer, qtarget_config=method, **arguments(family, **more))


def target_trainer(family: str, method, **more) -> QTargetSFTTrainer:
    return make_trainer(QTargetSFTTrainer, qtarget_config=method, **arguments(family, **more))


def inputs_of(trainer) -> dict:
    return {name: value for name, value in first_batch(trainer).items() if name != "labels"}


def other_picture(inputs: dict) -> dict:
    """The same batch with its pictures negated."""
    return inputs | {"pixel_values": -inputs["pixel_values"]}


@torch.no_grad()
def hidden_of(model, inputs: dict) -> torch.Tensor:
    return model.base_model(**inputs).last_hidden_state


PRIORS = {
    "model": lambda family: {"method": "asft", "ref_model": start(family, seed=1)},
    "base": lambda family: {"method": BASE},
    "base_lora": lambda family: {"method": "target_sft", "peft_config": lora()},
    "lagged": lambda family: {"method": LAGGED},
    "lagged_lora": lambda family: {"method": LAGGED, "peft_config": lora()},
}


QUICK = [*(("llava", prior) for prior in PRIORS), ("gemma3", "base_lora"), ("qwen2_5_vl", "model"), (MOE, "base_lora")]
ALL = [
    pytest.param(family, prior, marks=() if (family, prior) in QUICK else pytest.mark.slow, id=f"{family}-{prior}")
    for family in FAMILIES
    for prior in PRIORS
]


@pytest.mark.parametrize(("family", "prior"), ALL)
def test_prior_sees_the_images_and_the_loss_is_the_one_on_logits(family, prior):
    # Of a prompt nothing is a label.
    prompts = prior in ("model", "lagged_lora")
    run = run_target(family, **PRIORS[prior](family), prompts=prompts, steps=1)
    # After one step, before the first sync, a lagged prior is still the start.
    truth = start(family, seed=1 if prior == "model" else 0)
    batch, inputs = first_batch(run.trainer), inputs_of(run.trainer)
    assert (batch["labels"][:, :8] == -100).all() == prompts

    hidden, changed = (run.trainer._prior.states(dict(each)).hidden for each in (inputs, other_picture(inputs)))
    assert torch.equal(hidden, hidden_of(truth, inputs))
    assert torch.equal(changed, hidden_of(truth, other_picture(inputs)))
    # The text comes after the picture, so the states of its tokens change with it.
    assert relative_error(changed[:, -1], hidden[:, -1]) > 1e-3

    if run.trainer.aux_loss_enabled:
        check_auxiliary_loss(run.trainer, truth)
    else:
        check_equals_dense(run.trainer, truth, double=prior == "base_lora")


def check_auxiliary_loss(trainer, prior) -> None:
    """The policy's own load balance is in the loss and in the log; that of the prior is not."""
    trainer._running["train"].clear()
    batch = first_batch(trainer)
    loss, _ = loss_and_gradients(trainer, batch)
    with torch.no_grad():
        own = trainer.model(**batch, output_router_logits=True).aux_loss.item()
        target = dense_loss(trainer, batch, prior).item()
    assert trainer._running["train"].take()["aux_loss"] == pytest.approx(own, rel=DENSE_TOLERANCE)
    assert loss == pytest.approx(target + 0.05 * own, rel=DENSE_TOLERANCE)


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_every_trained_weight_moves(peft):
    run = run_target("llava", LAGGED, optim="adamw", peft_config=peft)
    assert run.moved()
    assert any("vision_tower" in name for name in run.weights)


@pytest.mark.parametrize(
    ("family", "method", "loss_type", "peft"),
    [
        ("llava", "sft", "nll", None),
        ("llava", "dft", "dft", lora()),
        ("gemma3", "dft", "dft", None),
        ("qwen2_5_vl", "sft", "nll", lora()),
        (MOE, "sft", "nll", None),
        (MOE, "dft", "dft", lora()),
    ],
)
def test_training_equals_trl(family, method, loss_type, peft):
    if TRL_BEFORE_1_15 and (family, method) == (MOE, "dft"):
        pytest.skip("this TRL has no auxiliary loss here")
    both = {"steps": 3, "peft_config": peft, "eval_dataset": tiny_vision.chat_dataset(4, seed=5)}
    options = {"eval_strategy": "steps", "eval_steps": 3}
    ours = run_target(family, method, options=options, **both)
    theirs = train(SFTTrainer, **arguments(family, options=options | {"loss_type": loss_type}, **both))
    # transformers 5.10 has no load balance for this mixture, TRL then none either.
    assert ours.trainer.aux_loss_enabled == theirs.trainer.aux_loss_enabled
    names = ("loss", "grad_norm", "entropy", "num_tokens", *(["aux_loss"] if ours.trainer.aux_loss_enabled else []))
    for line, truth in zip(ours.steps, theirs.steps, strict=True):
        assert {name: line[name] for name in names} == pytest.approx({name: truth[name] for name in names}, rel=5e-5)
    assert ours.evaluations[-1]["eval_loss"] == pytest.approx(theirs.evaluations[-1]["eval_loss"], rel=5e-5)
    assert worst(ours.weights, theirs.weights) < 5e-5


def test_reference_by_path_sees(tmp_path):
    start("llava", seed=1).save_pretrained(tmp_path)
    run = run_target("llava", "asft", ref_model=str(tmp_path), steps=1)
    check_equals_dense(run.trainer, start("llava", seed=1))


def test_rows_without_a_picture():
    """Some rows have no picture, and one batch has none at all: the vision tower is idle there."""
    dataset = tiny_vision.chat_dataset()
    rows = [dict(row) for row in dataset]
    for number in (1, 4, 5, 6, 7):
        rows[number]["images"] = []
    dataset = type(dataset).from_list(rows, features=dataset.features)
    options = {"train_sampling_strategy": "sequential"}
    run = run_target("llava", "asft", ref_model=start("llava", 1), dataset=dataset, options=options, steps=2)
    assert all(value.isfinite().all() for value in run.weights.values())
    sets = list(run.trainer.get_train_dataloader())
    assert ["pixel_values" in batch for batch in sets] == [True, False]
    for batch in sets:
        loss = run.trainer.compute_loss(run.trainer.model, dict(batch)).item()
        assert loss == pytest.approx(dense_loss(run.trainer, batch, start("llava", 1)).item(), rel=DENSE_TOLERANCE)


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_gradient_checkpointing(peft):
    plain = run_target("qwen2_5_vl", BASE, peft_config=peft)
    kept = run_target("qwen2_5_vl", BASE, peft_config=peft, options={"gradient_checkpointing": True})
    assert worst(kept.weights, plain.weights) < SAME


def test_accumulation_instead_of_batch():
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    one_by_one = run_target("llava", BASE, options=options)
    assert worst(one_by_one.weights, run_target("llava", BASE).weights) < 1e-5


# --- refusals ---


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_packing_stays_refused(option):
    with pytest.raises(ValueError, match=r"(Packing|Padding-free).* vision datasets"):
        target_trainer("llava", "asft", ref_model=start("llava", 1), options={option: True})


def test_truncated_image_is_explained():
    with pytest.raises(ValueError, match=r"`max_length` \(8\) cuts off image tokens"):
        run_target("gemma3", "sft", prompts=True, options={"max_length": 8})


def test_token_weights_of_images_are_refused():
    dataset = tiny_vision.chat_dataset()
    dataset = dataset.add_column("token_weights", [[1.0]] * len(dataset))
    with pytest.raises(ValueError, match="`token_weight_column` counts the tokens of a text"):
        target_trainer("llava", "cft", dataset=dataset)
