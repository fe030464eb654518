"""The policy's own model as the prior: what is trained beside the adapters, or thawed later, does not move it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from training import (
    SAME,
    check_equals_dense,
    first_batch,
    make_trainer,
    train_target,
    trainable,
    warm_model,
    worst,
)
from transformers import TrainerCallback

from trl_qtarget import PriorKind, QTargetConfig, QTargetSFTTrainer


BASE = QTargetConfig("asft", prior="base")
START = QTargetConfig("asft", prior="start")
LAGGED = QTargetConfig("psft", prior_sync_steps=2)


def biased():
    """A Llama with biases, which start away from zero."""
    model = tiny.model(attention_bias=True, mlp_bias=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.1)
    return model


def tied_model():
    return tiny.model(tie_word_embeddings=True)


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)


def adapted(peft, make: Callable[[], nn.Module] = tiny.model) -> PeftModel:
    """A model with adapters that are drawn the same each time."""
    model = warm_model(make)
    torch.manual_seed(5)
    return get_peft_model(model, peft)


def unfrozen(*parts: str, make: Callable[[], nn.Module] = tiny.model, peft: LoraConfig | None = None) -> PeftModel:
    """A LoRA model with parts of the base thawed beside it."""
    model = get_peft_model(warm_model(make), peft or lora())
    for name, value in model.named_parameters():
        if any(part in name for part in parts):
            value.requires_grad_(True)
    return model


def trained_adapter() -> PeftModel:
    """A LoRA model whose adapters have left their start, always the same."""
    return adapted(lora(init_lora_weights=False))


class Thaw(TrainerCallback):
    """Makes everything trainable that is called so, in the middle of a training."""

    def __init__(self, part: str, after: int = 2):
        self.part, self.after = part, after

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.after:
            for name, value in model.named_parameters():
                if self.part in name:
                    value.requires_grad_(True)


class All(QTargetSFTTrainer):
    """Its optimiser holds frozen parameters too, which move once they are thawed."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        return self.optimizer


def thawing(config, model, part, steps=5, **arguments) -> QTargetSFTTrainer:
    trainer = make_trainer(
        All, tiny.text_dataset(), model, steps=steps, qtarget_config=config, callbacks=[Thaw(part)], **arguments
    )
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if part in name}
    assert start and not any(value.requires_grad for name, value in trainer.model.named_parameters() if name in start)
    trainer.train()
    for name, value in start.items():
        assert not torch.equal(trainer.model.get_parameter(name), value), name
    return trainer


# --- what is trained beside the adapters ---


@pytest.mark.parametrize(("method", "bias"), [("asft", "none"), ("target_sft", "lora_only"), ("asft", "all")])
def test_base_prior_does_not_move_with_the_biases(bias, method):
    run = train_target(method, model=warm_model(biased), peft_config=lora(bias=bias), steps=4)
    assert run.moved()
    biases = {name for name in run.weights if name.endswith("bias")}
    assert (bias == "none") == (not biases)
    assert run.trainer._prior.parts.keys() == biases  # nothing else is kept
    check_equals_dense(run.trainer, warm_model(biased))


def test_base_prior_does_not_move_with_norms_and_embeddings():
    run = train_target(BASE, model=unfrozen("norm", "embed_tokens", make=tied_model), steps=4)
    assert run.moved() and len(run.trainer._prior.parts) == 2 * 2 + 1 + 1
    assert run.trainer.model.get_output_embeddings().weight.requires_grad
    check_equals_dense(run.trainer, warm_model(tied_model))


def test_base_prior_does_not_move_with_a_head_beside_the_adapters():
    run = train_target(BASE, model=unfrozen("lm_head"), steps=4)
    assert run.trainer._prior.parts.keys() == {"base_model.model.lm_head.weight"}
    check_equals_dense(run.trainer, warm_model())


@pytest.mark.parametrize(
    "peft",
    [
        lora(),
        lora(use_dora=True),
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices=[3, 4]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "dora", "modules_to_save", "tokens", "prompt"],
)
def test_base_prior_keeps_nothing_where_nothing_but_adapters_is_trained(peft):
    run = train_target(BASE, peft_config=peft, steps=1)
    assert run.weights and run.trainer._prior.parts == {}


def test_the_policy_in_mixed_precision_does_not_compute_with_the_biases_of_its_prior():
    """Autocast keeps the cast of a float32 parameter for as long as a forward lasts, and the prior runs within it."""
    options = {"bf16": True}
    trainer = train_target(BASE, model=warm_model(biased), peft_config=lora(bias="all"), options=options).trainer
    inputs = first_batch(trainer)
    request = trainer.target_request(inputs)
    alone = replace(request, prior=None, objective=QTargetConfig("sft").objective(has_prior=False))
    nll = [trainer.model(**inputs, qtarget=each).tokens.nll for each in (alone, request)]
    assert torch.equal(*nll)  # the same operations on the same numbers


# --- what is thawed later ---


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1", "lm_head"])
@pytest.mark.parametrize("config", [BASE, START], ids=["base", "start"])
def test_a_starting_copy_does_not_move_with_what_is_thawed_later(part, config):
    model = warm_model()
    for name, value in model.named_parameters():
        value.requires_grad_(part not in name)
    trainer = thawing(config, model, part)
    assert trainer.prior_choice.kind is PriorKind.STARTING_COPY
    check_equals_dense(trainer, warm_model())


def test_a_starting_copy_with_tied_embeddings_that_are_thawed_later():
    model = warm_model(tied_model)
    model.get_input_embeddings().requires_grad_(False)
    trainer = thawing(BASE, model, "embed_tokens")
    copy = trainer._prior.causal_model
    assert copy.lm_head.weight is copy.get_input_embeddings().weight
    check_equals_dense(trainer, warm_model(tied_model))


@pytest.mark.parametrize("part", ["norm", "lm_head", "bias"])
def test_base_prior_under_lora_does_not_move_with_what_is_thawed_later(part):
    trainer = thawing(BASE, get_peft_model(warm_model(biased), lora()), part)
    check_equals_dense(trainer, warm_model(biased))


def test_start_prior_under_lora_does_not_move_with_what_is_thawed_later():
    trainer = thawing(START, trained_adapter(), "norm")
    check_equals_dense(trainer, trained_adapter().eval())


def test_start_prior_remembers_what_was_trained_for_a_while():
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.get_output_embeddings().requires_grad_(False)

    run = train_target(BASE, model=unfrozen("lm_head"), steps=4, callbacks=[Freeze()])
    assert not run.trainer.model.get_output_embeddings().weight.requires_grad
    check_equals_dense(run.trainer, warm_model())


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_lagged_prior_follows_what_is_thawed_later(peft):
    model = warm_model() if peft is None else get_peft_model(warm_model(), peft)
    if peft is None:
        model.model.requires_grad_(False)
    kept = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kept.append({name: value.detach().clone() for name, value in model.named_parameters()})

    trainer = make_trainer(
        All, tiny.text_dataset(), model, steps=5, qtarget_config=LAGGED, callbacks=[Thaw("norm"), Watch()]
    )
    trainer.train()
    parts = trainer._prior.parts
    assert any("norm" in name for name in parts)
    assert worst(parts, {name: kept[3][name] for name in parts}) == 0  # of the fourth step, the last sync
    assert worst(parts, {name: kept[4][name] for name in parts}) > 1e-4


TOKENS = {
    "tied": (True, {"trainable_token_indices": [3, 4, 5, 6]}),
    "head": (False, {"trainable_token_indices": {"lm_head": list(range(3, 40))}}),
    "both": (
        False,
        {"trainable_token_indices": {"embed_tokens": list(range(280, 320)), "lm_head": list(range(3, 40))}},
    ),
    "whole": (False, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", TOKENS)
def test_lagged_prior_has_the_head_of_its_moment(case):
    """PEFT computes the weight of a head of which it trains some rows, from rows that move."""
    tied, options = TOKENS[case]

    def start():
        return adapted(lora(**options), tied_model if tied else tiny.model)

    config = QTargetConfig("asft", lam=0.5, prior="lagged", prior_sync_steps=1000)  # that of the start, so
    run = train_target(config, model=start(), steps=4, optim="adamw")
    assert run.moved()
    check_equals_dense(run.trainer, start().eval())


# --- the starting policy ---


@pytest.mark.parametrize("method", ["asft", "iw_sft", "target_sft", "sft_kl"])
def test_start_prior_is_the_policy_with_its_trained_adapters(method):
    run = train_target(QTargetConfig(method, prior="start"), model=trained_adapter(), steps=4)
    assert run.moved() and run.trainer._prior.parts.keys() == run.weights.keys()
    check_equals_dense(run.trainer, trained_adapter().eval())


@pytest.mark.parametrize(
    "peft",
    [
        lora(modules_to_save=["lm_head"]),
        lora(bias="all"),
        lora(init_lora_weights="pissa"),
        lora(trainable_token_indices={"lm_head": [3, 4, 5]}),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["modules_to_save", "bias", "pissa", "tokens", "prompt"],
)
def test_start_prior_of_every_kind_of_adapter(peft):
    def start():
        return adapted(peft, biased)

    run = train_target(START, model=start(), steps=3, optim="adamw")
    assert run.moved()
    inputs = {name: value for name, value in first_batch(run.trainer).items() if name != "labels"}
    prior = run.trainer._prior.states(inputs)
    with torch.no_grad():
        truth = start().eval()(**inputs).logits
    # The last bits: a batched product with the head may sum in another order.
    torch.testing.assert_close(prior.hidden @ prior.head().weight.T, truth, rtol=0, atol=1e-5)


def test_start_and_base_are_one_without_peft():
    start, base = train_target(START, steps=3), train_target(BASE, steps=3)
    assert worst(start.weights, base.weights) < SAME


def test_start_prior_begins_as_the_policy():
    run = train_target(QTargetConfig("iw_sft", prior="start"), model=trained_adapter(), steps=1)
    assert run.column("target/trust") == pytest.approx([1.0], abs=1e-5)
    base = train_target(QTargetConfig("iw_sft", prior="base"), model=trained_adapter(), steps=1)
    assert abs(base.column("target/trust")[0] - 1) > 0.1


def test_a_second_training_goes_on_from_the_same_start():
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), trained_adapter(), qtarget_config=START)
    trainer.train()
    trainer.train()
    check_equals_dense(trainer, trained_adapter().eval())


def test_an_evaluation_before_the_training_changes_nothing():
    def run(evaluate: bool):
        trainer = make_trainer(
            QTargetSFTTrainer,
            tiny.text_dataset(),
            trained_adapter(),
            qtarget_config=START,
            eval_dataset=tiny.text_dataset(4),
        )
        if evaluate:
            trainer.evaluate()
        trainer.train()
        return trainable(trainer.model)

    assert worst(run(True), run(False)) < SAME


# --- which of the two is meant ---


def warnings_of(logged) -> list[str]:
    return [message for message in logged() if "have been trained already" in message]


@pytest.mark.parametrize("method", ["asft", "target_sft"])
def test_a_trained_adapter_is_told_once(method, logged):
    train_target(method, model=trained_adapter())
    (warning,) = warnings_of(logged)
    assert "`prior='start'`" in warning and "`prior='base'`" in warning


@pytest.mark.parametrize(
    "config, make",
    [
        (QTargetConfig("asft", prior="base"), trained_adapter),
        (QTargetConfig("asft", prior="start"), trained_adapter),
        (QTargetConfig("psft"), trained_adapter),
        (QTargetConfig("sft"), trained_adapter),
        (QTargetConfig("asft"), lambda: get_peft_model(warm_model(), lora())),
        (QTargetConfig("asft"), lambda: get_peft_model(warm_model(), lora(use_dora=True))),
        (QTargetConfig("asft"), lambda: get_peft_model(warm_model().bfloat16(), lora(use_dora=True))),
        (QTargetConfig("asft"), lambda: get_peft_model(warm_model(), lora(modules_to_save=["lm_head"]))),
        (QTargetConfig("asft"), warm_model),
    ],
    ids=["base", "start", "lagged", "none", "new", "dora", "dora-bf16", "saved", "full"],
)
def test_nothing_is_told_where_it_is_said_or_the_same(config, make, logged):
    train_target(config, model=make(), steps=1)
    assert not warnings_of(logged)


def test_a_new_adapter_of_the_trainer_is_not_taken_for_a_trained_one(logged):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    train_target("asft", peft_config=peft, steps=1)
    assert not warnings_of(logged)
    train_target("asft", model=get_peft_model(warm_model(), peft), steps=1)
    assert len(warnings_of(logged)) == 1
