"""Training toward every target, however it is named, in the situations that trainers get into."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from thinned import by_ways, thinned
from training import (
    SAME,
    check_equals_dense,
    dense_loss,
    first_batch,
    loss_and_gradients,
    make_trainer,
    other_model,
    sft_config,
    train,
    train_target,
    warm_model,
    worst,
)
from transformers import BitsAndBytesConfig
from trl import SFTTrainer

from trl_qtarget import METHODS, QTargetConfig, QTargetSFTTrainer, register_trust
from trl_qtarget.target.trust import TRUSTS


LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def weighted_dataset(count: int = 24) -> Dataset:
    rows = tiny.tokenizer()([text + "<eos>" for text in tiny.sentences(count, seed=1)])["input_ids"]
    return Dataset.from_dict({"input_ids": rows, "token_weights": [[token % 5 / 2 for token in row] for row in rows]})


# --- every target ---


@pytest.mark.parametrize(
    "method", thinned(METHODS, lambda method: by_ways(method) or method in ("cft", "psft", "distill", "adaptive_sft"))
)
def test_train_every_method(method):
    teacher = method.startswith("distill")
    run = train_target(
        method,
        weighted_dataset() if method == "cft" else None,
        ref_model=other_model() if teacher else None,
        steps=4,
    )
    assert all(math.isfinite(loss) for loss in run.column("loss"))
    assert run.moved()
    # Four steps on, the prior (the starting weights, lagged by eight steps, or the teacher) is another model.
    needs_prior = METHODS[method].prior not in (None, "auto")
    prior = (other_model() if teacher else warm_model()) if needs_prior else None
    check_equals_dense(run.trainer, prior)


@pytest.mark.parametrize(
    "config",
    [
        QTargetConfig(method=None, trust="entropy", residual="guided", top_k=20, eta=0.3),
        QTargetConfig(method=None, trust="threshold", residual="neighbors", tau=0.2, top_k=5),
        QTargetConfig(method=None, trust="importance", residual="prior", prior="base"),
    ],
    ids=lambda config: f"{config.trust}-{config.residual}",
)
def test_train_free_combination(config):
    run = train_target(config, ref_model=other_model() if config.residual == "guided" else None, steps=3)
    assert run.moved()
    prior = {"guided": other_model, "neighbors": lambda: None, "prior": warm_model}[config.residual]()
    check_equals_dense(run.trainer, prior)


def test_train_registered_trust():
    @register_trust("root_for_this_test")
    def root(tile):
        return tile.label_probs.sqrt()

    try:
        run = train_target({"method": None, "trust": "root_for_this_test", "residual": "uniform"})
        assert run.moved()
        check_equals_dense(run.trainer)
    finally:
        del TRUSTS["root_for_this_test"]


# --- naming the target ---


def test_train_config_as_string_dict_or_object():
    forms = ["gem", {"method": "gem"}, QTargetConfig("gem")]
    runs = [train_target(form) for form in forms]
    for run in runs[1:]:
        assert worst(run.weights, runs[0].weights) < SAME
    assert train_target({"method": "gem", "beta": 0.5}).column("loss") != runs[0].column("loss")


def test_train_default_is_target_sft():
    assert train_target(None, steps=1).trainer.qtarget_config == QTargetConfig("target_sft")


def test_train_loss_type_dft_means_dft():
    named = train_target("dft")
    meant = train_target(None, options={"loss_type": "dft"})
    assert meant.trainer.qtarget_config == QTargetConfig("dft")
    assert worst(meant.weights, named.weights) < SAME
    train_target("dft", options={"loss_type": "dft"}, steps=1)


def test_train_positional_arguments_of_sft_trainer():
    train_set, eval_set, tokenizer = tiny.text_dataset(8), tiny.text_dataset(6, 3), tiny.tokenizer()
    args = sft_config(max_steps=1)
    trainer = QTargetSFTTrainer(warm_model(), args, None, train_set, eval_set, tokenizer, qtarget_config="sft")
    assert trainer.args is args
    assert trainer.processing_class is tokenizer
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (8, 6)
    with pytest.raises(TypeError, match="positional"):
        QTargetSFTTrainer(warm_model(), args, *[None] * 14, "sft")


def test_train_from_a_path(tmp_path):
    warm_model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    run = train_target("asft", model=str(tmp_path), processing_class=None)
    assert worst(run.weights, train_target("asft").weights) < SAME


# --- situations ---


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_train_gradient_checkpointing_with_base_prior(peft, reentrant):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    config = QTargetConfig("asft", prior="base")
    plain = train_target(config, peft_config=peft)
    run = train_target(config, peft_config=peft, options=checkpointing)
    assert run.trainer.model.is_gradient_checkpointing
    assert worst(run.weights, plain.weights) < SAME


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="offloads from an accelerator")
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_train_activation_offloading(peft):
    options, config = {"use_cpu": False}, QTargetConfig("asft", prior="base")
    plain = train_target(config, options=options, peft_config=peft)
    run = train_target(config, options=options | {"activation_offloading": True}, peft_config=peft)
    assert worst(run.weights, plain.weights) < 1e-5


@pytest.mark.parametrize("method", ["target_sft", "asft"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig], ids=["prompt", "prefix"])
def test_train_prompt_learning_with_base_prior(method, kind):
    peft = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    run = train_target(method, peft_config=peft, optim="adamw", steps=4)
    assert all(math.isfinite(loss) for loss in run.column("loss"))
    assert run.moved()
    # The prior sees no virtual token, so nothing predicts the first real one: it is not scored.
    check_equals_dense(run.trainer, warm_model())


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_train_all_labels_of_a_micro_batch_ignored(peft):
    rows = tiny.tokenizer()(tiny.sentences(6, seed=1))["input_ids"]
    ignored = [[-100] * len(row) for row in rows]
    options = {"max_length": None, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    both = Dataset.from_dict(
        {
            "input_ids": [row for row in rows for _ in range(2)],
            "labels": [labels for pair in zip(rows, ignored, strict=True) for labels in pair],
        }
    )
    config = QTargetConfig("asft", prior="base")
    run = train_target(config, both, options=options | {"gradient_accumulation_steps": 2}, peft_config=peft)
    alone = train_target(config, Dataset.from_dict({"input_ids": rows}), options=options, peft_config=peft)
    assert run.column("loss") == pytest.approx(alone.column("loss"), rel=SAME)
    assert worst(run.weights, alone.weights) < SAME


def test_train_every_label_ignored():
    rows = tiny.tokenizer()(tiny.sentences(8, seed=1))["input_ids"]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": [[-100] * len(row) for row in rows]})
    run = train_target("iw_sft", dataset, options={"max_length": None}, steps=2)
    assert run.column("loss") == run.column("grad_norm") == [0, 0]
    assert worst(run.weights, run.start) < SAME


def test_train_quantized_model_with_base_prior(tmp_path):
    pytest.importorskip("bitsandbytes")
    # On a CPU, bitsandbytes asks for widths that are multiples of 32.
    warm_model(wide_model).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    arguments = {"model": str(tmp_path), "quantization_config": nf4, "peft_config": adapter, "optim": "adamw"}
    run = train_target("asft", steps=3, **arguments)
    assert run.trainer.model.is_loaded_in_4bit
    assert run.moved()

    # A second copy gives the truth. It is never in evaluation mode, for which bitsandbytes may repack the weights on a
    # CPU, in a layout that no gradient passes through.
    truth = train_target("sft", steps=1, options={"learning_rate": 0.0}, **arguments).trainer
    truth.qtarget_config = run.trainer.qtarget_config
    truth.model.load_state_dict(run.weights, strict=False)

    def adapter_off(**inputs):
        with truth.model.disable_adapter():
            return truth.model(**inputs)

    batch = first_batch(run.trainer)
    loss, gradients = loss_and_gradients(run.trainer, batch)
    expected = dense_loss(truth, batch, adapter_off)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    grads = {name: value.grad for name, value in truth.model.named_parameters() if value.requires_grad}
    # TRL keeps the adapters of a quantized model in bfloat16, whose rounding is 2^-9.
    assert worst(gradients, grads) < 2**-6


def wide_model():
    return tiny.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4)


def test_train_bfloat16_weights():
    model, reference = warm_model().bfloat16(), warm_model().bfloat16()
    run = train(QTargetSFTTrainer, tiny.text_dataset(), model, qtarget_config="asft", ref_model=reference)
    truth = train_target("asft", ref_model=warm_model())
    assert run.column("loss")[0] == pytest.approx(truth.column("loss")[0], rel=2e-2)  # bfloat16 keeps 8 bits
    assert all(weight.dtype == torch.bfloat16 for weight in run.weights.values())


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_train_bfloat16_autocast(peft):
    config = QTargetConfig("asft", prior="base")
    run = train_target(config, options={"bf16": True}, peft_config=peft)
    truth = train_target(config, peft_config=peft)
    assert run.column("loss") == pytest.approx(truth.column("loss"), rel=1e-2)  # measured 1e-3; bfloat16 keeps 8 bits
    assert run.column("loss") != truth.column("loss")
    assert all(weight.dtype == torch.float32 for weight in run.weights.values())


def test_train_in_small_chunks():
    run = train_target(QTargetConfig("asft", chunk_tokens=5, prior="base"))
    assert worst(run.weights, train_target("asft").weights) < SAME


def test_train_a_loaded_adapter_goes_on():
    model = get_peft_model(warm_model(), LORA)
    run = train_target("target_sft", model=model)
    assert isinstance(run.trainer.model, PeftModel)
    check_equals_dense(run.trainer, warm_model())


def test_train_streaming_with_base_prior():
    stream = tiny.text_dataset().to_iterable_dataset()
    assert train_target(QTargetConfig("asft", prior="base"), stream).moved()


def test_train_generates_after_training():
    run = train_target("target_sft")
    text = run.trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert text.shape[1] > 3


def test_train_sft_gradient_is_trl_gradient():
    ours = make_trainer(QTargetSFTTrainer, tiny.text_dataset(4), warm_model(), qtarget_config="sft")
    theirs = make_trainer(SFTTrainer, tiny.text_dataset(4), warm_model())
    batch = first_batch(ours)
    loss, gradients = loss_and_gradients(ours, batch)
    truth, expected = loss_and_gradients(theirs, batch)
    assert loss == pytest.approx(truth, rel=SAME)
    assert worst(gradients, expected) < 2e-6
