"""Where the prior comes from: each source is the model that it says it is, at every moment of a run."""

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from training import (
    DENSE_TOLERANCE,
    SAME,
    check_equals_dense,
    dense_loss,
    first_batch,
    loss_and_gradients,
    make_trainer,
    other_model,
    train_target,
    trainable,
    warm_model,
    worst,
)
from transformers import TrainerCallback

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


BASE = QTargetConfig("asft", prior="base")


def lora(**options):
    return LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def wide_model():
    return tiny.model(hidden_size=24, num_hidden_layers=1)


def model_inputs(trainer) -> dict:
    return {name: value for name, value in first_batch(trainer).items() if name != "labels"}


def states(trainer):
    return trainer._prior.states(model_inputs(trainer))


@torch.no_grad()
def hidden_of(model, trainer):
    return model.base_model(**model_inputs(trainer)).last_hidden_state


# --- policy ---


@pytest.mark.parametrize("prior", ["auto", "policy"])
def test_policy_prior_without_peft_is_dft(prior, logged):
    run = train_target(QTargetConfig("target_sft", prior=prior))
    assert run.trainer._prior is None
    assert worst(run.weights, train_target("dft").weights) < SAME
    warnings = [message for message in logged() if "the prior is the policy's own distribution" in message]
    assert len(warnings) == (prior == "auto")


def test_policy_prior_under_peft_is_dft():
    run = train_target(QTargetConfig("target_sft", prior="policy"), peft_config=lora())
    assert worst(run.weights, train_target("dft", peft_config=lora()).weights) < SAME


def test_no_prior_for_a_method_without_one(logged):
    assert train_target("sft", peft_config=lora(), steps=1).trainer._prior is None
    (line,) = logged()
    assert "no prior" in line


# --- base ---


@pytest.mark.parametrize("method", ["target_sft", "asft"])
def test_base_prior_under_lora_is_the_bare_model(method, logged):
    run = train_target(method, peft_config=lora(), steps=4)
    assert run.moved()
    prior = states(run.trainer)
    assert torch.equal(prior.hidden, hidden_of(warm_model(), run.trainer))
    assert torch.equal(prior.head().weight, warm_model().lm_head.weight)
    assert not prior.hidden.requires_grad and not prior.head().weight.requires_grad
    check_equals_dense(run.trainer, warm_model())
    assert sum("the prior is the base weights (adapters off)" in message for message in logged()) == 1


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
def test_base_prior_under_lora_with_trained_modules(saved):
    peft = lora(modules_to_save=saved)
    peft.target_modules = ["q_proj", "v_proj"]
    run = train_target(BASE, peft_config=peft, steps=3)
    assert run.moved()
    assert any(saved[0] in name for name in run.weights)
    prior = states(run.trainer)
    assert torch.equal(prior.head().weight, warm_model().lm_head.weight)
    check_equals_dense(run.trainer, warm_model())


def test_base_prior_without_peft_is_the_starting_model(logged):
    run = train_target(BASE, steps=4)
    prior = states(run.trainer)
    assert torch.equal(prior.hidden, hidden_of(warm_model(), run.trainer))
    assert torch.equal(prior.head().weight, warm_model().lm_head.weight)
    assert not torch.equal(prior.head().weight, run.trainer.model.lm_head.weight)
    check_equals_dense(run.trainer, warm_model())
    assert any("the prior is the starting weights (a frozen copy)" in message for message in logged())


def test_base_prior_with_tied_embeddings():
    def tied():
        return tiny.model(tie_word_embeddings=True)

    run = train_target(BASE, model=warm_model(tied), steps=3)
    assert run.trainer.model.lm_head.weight is run.trainer.model.get_input_embeddings().weight
    check_equals_dense(run.trainer, warm_model(tied))


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_base_prior_of_a_mixture_of_experts(peft):
    run = train_target(BASE, model=warm_model(tiny.moe_model), peft_config=peft, steps=3)
    batch = first_batch(run.trainer)
    loss, _ = loss_and_gradients(run.trainer, batch)
    aux_loss = run.trainer._running["train"].take()["aux_loss"]
    assert aux_loss > 0
    expected = dense_loss(run.trainer, batch, warm_model(tiny.moe_model)) + 0.05 * aux_loss
    assert loss == pytest.approx(expected.item(), rel=DENSE_TOLERANCE)


def test_base_prior_of_a_partly_frozen_model():
    model = warm_model()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    run = train_target(BASE, model=model)
    assert run.trainer._prior.causal_model.lm_head.weight is run.trainer.model.lm_head.weight
    check_equals_dense(run.trainer, warm_model())


def test_base_prior_leaves_a_frozen_part_of_the_adapter_frozen():
    model = get_peft_model(warm_model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    run = train_target(BASE, model=model)
    assert run.weights.keys() == run.start.keys()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig], ids=["prompt", "prefix"])
def test_base_prior_under_prompt_learning_is_the_bare_model(kind):
    run = train_target(BASE, peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=4), optim="adamw")
    assert torch.equal(states(run.trainer).hidden, hidden_of(warm_model(), run.trainer))


# --- model ---


def test_model_prior_by_instance(logged):
    reference = other_model()
    run = train_target("asft", ref_model=reference, steps=4)
    check_equals_dense(run.trainer, other_model())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert worst(dict(reference.named_parameters()), dict(other_model().named_parameters())) == 0
    assert any("the prior is the reference model" in message for message in logged())


def test_model_prior_by_path_and_of_another_width(tmp_path):
    warm_model(wide_model).save_pretrained(tmp_path)
    run = train_target("distill", ref_model=str(tmp_path), steps=4)
    assert states(run.trainer).hidden.shape[-1] == 24
    check_equals_dense(run.trainer, warm_model(wide_model))


def test_model_prior_by_path_has_the_dtype_of_the_policy(tmp_path):
    warm_model(wide_model).save_pretrained(tmp_path)
    run = train_target("distill", model=warm_model().bfloat16(), ref_model=str(tmp_path), steps=1)
    assert states(run.trainer).head().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["target_sft", "iw_sft", "psft"])
def test_reference_model_comes_before_the_base_under_lora(method):
    run = train_target(method, peft_config=lora(), ref_model=other_model())
    check_equals_dense(run.trainer, warm_model() if method == "psft" else other_model())


def test_model_prior_with_adapters():
    torch.manual_seed(5)
    teacher = get_peft_model(other_model(), lora(init_lora_weights=False))
    torch.manual_seed(5)
    same = get_peft_model(other_model(), lora(init_lora_weights=False)).eval()
    run = train_target("distill", ref_model=teacher)
    check_equals_dense(run.trainer, same)


def test_reference_model_instead_of_the_named_base_is_told(logged):
    train_target(BASE, ref_model=other_model(), steps=1)
    assert any("`prior='base'` is overridden" in message for message in logged())


def test_unused_reference_model_is_told(logged):
    reference = other_model()
    run = train_target("sft", ref_model=reference, steps=1)
    assert run.trainer._prior is None
    assert any("`ref_model` is not used by `method='sft'`" in message for message in logged())
    assert all(parameter.requires_grad for parameter in reference.parameters())


def test_reference_model_may_be_shared_by_two_trainers():
    reference = other_model()
    first = train_target("distill", ref_model=reference)
    second = train_target("distill", ref_model=reference)
    assert worst(second.weights, first.weights) < SAME


# --- lagged ---


class Recorder(TrainerCallback):
    """The trainable weights after every optimiser step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(trainable(model))


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lagged_prior_copies_every_n_optimiser_steps(peft, accumulation):
    recorder = Recorder()
    config = QTargetConfig("psft", prior_sync_steps=3)
    run = train_target(
        config,
        steps=8,
        peft_config=peft,
        callbacks=[recorder],
        options={"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2},
    )
    assert len(recorder.weights) == 8
    assert worst(run.trainer._prior.parts, recorder.weights[5]) < SAME
    assert worst(run.trainer._prior.parts, run.weights) > 1e-3


def test_lagged_prior_average_is_the_hand_computed_one():
    recorder = Recorder()
    config = QTargetConfig("asft", prior="lagged", prior_sync_steps=2, prior_sync_decay=0.75)
    run = train_target(config, steps=7, callbacks=[recorder])
    expected = {name: value.double() for name, value in run.start.items()}
    for step in (2, 4, 6):
        live = recorder.weights[step - 1]
        expected = {name: 0.75 * value + 0.25 * live[name].double() for name, value in expected.items()}
    assert worst(run.trainer._prior.parts, expected) < SAME
    average = warm_model()
    average.load_state_dict({name: value.float() for name, value in expected.items()})
    check_equals_dense(run.trainer, average)


def test_lagged_prior_average_of_half_precision_weights_is_kept_in_single():
    recorder = Recorder()
    config = QTargetConfig("psft", prior_sync_steps=1, prior_sync_decay=0.999)
    run = train_target(config, model=warm_model().bfloat16(), steps=3, callbacks=[recorder])
    expected = {name: value.double() for name, value in run.start.items()}
    for live in recorder.weights:
        expected = {name: 0.999 * value + 0.001 * live[name].double() for name, value in expected.items()}
    assert worst(run.trainer._prior.parts, expected) < SAME


def test_psft_gradient_after_a_sync_is_sft_gradient():
    synced = train_target(QTargetConfig("psft", prior_sync_steps=2), steps=4).trainer
    sft = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), synced.model, qtarget_config="sft")
    batch = first_batch(sft)
    _, gradients = loss_and_gradients(synced, batch)
    _, truth = loss_and_gradients(sft, batch)
    assert worst(gradients, truth) < DENSE_TOLERANCE
    between = train_target(QTargetConfig("psft", prior_sync_steps=2), steps=3).trainer
    check_equals_dense_of_snapshot(between)


def check_equals_dense_of_snapshot(trainer):
    snapshot = warm_model()
    snapshot.load_state_dict(trainer._prior.parts)
    check_equals_dense(trainer, snapshot)


def test_lagged_prior_moves_between_syncs_only():
    """With one sync per step the prior is always the current policy, so `psft` trains as `sft`, unless it lags."""
    current = train_target(QTargetConfig("psft", prior_sync_steps=1), steps=4)
    sft = train_target("sft", steps=4)
    assert worst(current.weights, sft.weights) < 1e-5
    assert worst(train_target(QTargetConfig("psft", prior_sync_steps=4), steps=4).weights, sft.weights) > 1e-3


# --- a prior leaves no trace on the policy ---


@pytest.mark.parametrize("source", ["base_lora", "base", "model", "lagged"])
def test_prior_is_deterministic_under_dropout(source):
    def dropping():
        return tiny.model(attention_dropout=0.5)

    config = QTargetConfig("asft", prior={"base_lora": "base"}.get(source, source))
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model(dropping),
        qtarget_config=config,
        peft_config=lora(lora_dropout=0.5) if source == "base_lora" else None,
        ref_model=warm_model(dropping) if source == "model" else None,
    )
    inputs = model_inputs(trainer)
    trainer.model.train()
    first, second = trainer._prior.states(inputs).hidden, trainer._prior.states(inputs).hidden
    assert torch.equal(first, second)
    assert torch.equal(first, warm_model(dropping).base_model(**inputs).last_hidden_state)
    assert all(module.training for module in trainer.model.modules())
    trainer.train()
    assert trainer.model.training


@pytest.mark.parametrize("config", [BASE, QTargetConfig("psft")], ids=["base", "lagged"])
def test_prior_gives_the_policy_its_weights_back_after_an_error(config):
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config=config)
    trainer.model.train()
    with torch.no_grad():
        trainer.model.lm_head.weight += 1
    before = trainable(trainer.model)
    with pytest.raises(IndexError):
        trainer._prior.states({"input_ids": torch.tensor([[10**6]])})
    assert worst(trainable(trainer.model), before) == 0
    assert trainer.model.training


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_prior_does_not_reach_the_gradient_or_the_random_numbers(peft):
    def generator_after(trainer):
        batch = first_batch(trainer)
        torch.manual_seed(0)
        loss_and_gradients(trainer, batch)
        return torch.rand(1)

    trainers = [
        make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config=config, peft_config=peft)
        for config in ("dft", BASE)
    ]
    assert generator_after(trainers[0]) == generator_after(trainers[1])


# --- packed batches ---


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}])
def test_prior_sees_packed_documents_as_padded_ones(options):
    def trainer(**options):
        return make_trainer(
            QTargetSFTTrainer,
            tiny.text_dataset(8),
            warm_model(),
            qtarget_config="asft",
            ref_model=other_model(),
            options={"per_device_train_batch_size": 8} | options,
        )

    padded, packed = trainer(), trainer(**options)
    batch = first_batch(packed)
    assert len(batch["input_ids"]) == 1 and (batch["position_ids"] == 0).sum() == 8
    loss, gradients = loss_and_gradients(packed, batch)
    truth, expected = loss_and_gradients(padded, first_batch(padded))
    assert loss == pytest.approx(truth, rel=DENSE_TOLERANCE)
    assert worst(gradients, expected) < DENSE_TOLERANCE
