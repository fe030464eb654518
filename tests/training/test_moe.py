"""Mixtures of experts: the policy's load balance stays in the loss as TRL has it, whatever router the prior has."""

import pytest
import tiny
from peft import LoraConfig
from training import (
    DENSE_TOLERANCE,
    SAME,
    TRL_BEFORE_1_15,
    batches,
    check_equals_dense,
    dense_loss,
    train,
    train_target,
    warm_model,
    worst,
)
from trl import SFTTrainer

from trl_qtarget import QTargetConfig


COEFFICIENT = 0.05


def policy():
    return warm_model(tiny.moe_model)


def other():
    return warm_model(tiny.moe_model, steps=12)


def lora():
    return LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


PRIORS = {
    "model": (QTargetConfig("asft"), lambda: {"ref_model": other()}, other),
    "dense_model": (QTargetConfig("asft"), lambda: {"ref_model": warm_model()}, warm_model),
    "base": (QTargetConfig("asft", prior="base"), dict, policy),
    "base_lora": (QTargetConfig("target_sft"), lambda: {"peft_config": lora()}, policy),
    "lagged": (QTargetConfig("asft", prior="lagged"), dict, policy),
}
ACCUMULATION = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def resting(options=None, **arguments):
    """A run that logs every batch and moves nothing."""
    return {"options": {"learning_rate": 0.0, "train_sampling_strategy": "sequential"} | (options or {}), **arguments}


@pytest.mark.parametrize(
    ("prior", "options"),
    [
        ("model", ACCUMULATION),
        ("base_lora", ACCUMULATION),
        ("lagged", {}),
        pytest.param("dense_model", {}, marks=pytest.mark.slow),
        pytest.param("base", ACCUMULATION, marks=pytest.mark.slow),
    ],
)
def test_auxiliary_loss_is_that_of_trl(prior, options):
    config, arguments, model = PRIORS[prior]
    run = train_target(config, model=policy(), **resting(options), **arguments())
    peft = {"peft_config": lora()} if prior == "base_lora" else {}
    theirs = train(SFTTrainer, tiny.text_dataset(), policy(), **resting(options), **peft)
    assert run.column("aux_loss") == pytest.approx(theirs.column("aux_loss"), rel=SAME)
    # The target's own loss is a sum over tokens; the load balance is a mean over micro-batches.
    steps = options.get("gradient_accumulation_steps", 1)
    groups = batches(run.trainer)
    for number, line in enumerate(run.steps):
        micro = groups[number * steps : (number + 1) * steps]
        counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in micro]
        sums = [
            dense_loss(run.trainer, batch, model()).item() * count for batch, count in zip(micro, counts, strict=True)
        ]
        expected = sum(sums) / sum(counts) + COEFFICIENT * line["aux_loss"]
        assert line["loss"] == pytest.approx(expected, rel=2 * DENSE_TOLERANCE)


@pytest.mark.parametrize("prior", ["model", "dense_model", "base", "base_lora"])
def test_prior_does_not_reach_the_router(prior):
    """Without the coefficient, the gradients are those of the target alone."""
    config, arguments, model = PRIORS[prior]
    run = train_target(config, model=policy(), options={"router_aux_loss_coef": 0.0}, **arguments())
    assert "aux_loss" not in run.steps[0]
    check_equals_dense(run.trainer, model())


@pytest.mark.skipif(TRL_BEFORE_1_15, reason="this TRL does not average it over accumulation steps")
def test_auxiliary_loss_moves_the_routers_as_in_trl():
    """With a weight this large the load balance is most of the loss."""
    options = {"router_aux_loss_coef": 5.0, "learning_rate": 0.05}
    ours = train_target("sft", model=policy(), options=options | ACCUMULATION)
    theirs = train(SFTTrainer, tiny.text_dataset(), policy(), options=options | ACCUMULATION)
    assert worst(ours.weights, theirs.weights) < DENSE_TOLERANCE
    without = train_target("sft", model=policy(), options=options | ACCUMULATION | {"router_aux_loss_coef": 0.0})
    assert worst(ours.weights, without.weights) > 1e-2
