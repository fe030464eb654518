"""Whatever a class puts around its output embeddings: the loss is that of the model's own logits, or it is refused."""

import random
import re

import heads
import numpy
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from quantized import int8, nf4, wide
from torch import nn
from training import (
    DENSE_TOLERANCE,
    check_equals_dense,
    first_batch,
    loss_and_gradients,
    make_trainer,
    warm_model,
    worst,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.loss.head import add_target_head, check_head


def data() -> Dataset:
    """Ids that every model of `heads` knows, and that no image stands for."""
    rng = random.Random(0)
    return Dataset.from_dict(
        {"input_ids": [[rng.randrange(5, 300) for _ in range(rng.randint(4, 12))] for _ in range(8)]}
    )


def trainer(model, method="sft", **arguments) -> QTargetSFTTrainer:
    # The load balance of a mixture of experts is another loss.
    arguments["options"] = {"router_aux_loss_coef": 0.0} | arguments.get("options", {})
    return make_trainer(QTargetSFTTrainer, data(), model, qtarget_config=method, **arguments)


@pytest.mark.parametrize("method", ["sft", "gem"])
@pytest.mark.parametrize("name", heads.FITTING)
def test_loss_and_gradients_of_the_policy(name, method):
    """Of every parameter, the layers before the head included."""
    check_equals_dense(trainer(heads.build(heads.FITTING[name]), method))


@pytest.mark.parametrize("name", heads.FITTING)
def test_loss_of_a_teacher(name):
    teacher = heads.build(heads.FITTING[name], seed=1)
    student = heads.build(heads.FITTING[name])  # of the same vocabulary
    made = trainer(student, "distill_hybrid", ref_model=teacher)
    check_equals_dense(made, heads.build(heads.FITTING[name], seed=1))


@pytest.mark.parametrize("prior", ["base", "lagged"])
@pytest.mark.parametrize("peft", [False, True])
def test_priors_that_are_the_policy_itself(prior, peft):
    """The layers before the head belong to the adapter's base, to the copy, and to the lagged weights."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config = {"method": "asft", "prior": prior, "prior_sync_steps": 4 if prior == "lagged" else None}
    made = trainer(heads.build(heads.modernbert), config, peft_config=lora if peft else None, steps=2)
    made.train()
    made.model.eval()
    check_equals_dense(made, heads.build(heads.modernbert))


def test_prompt_learning():
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = trainer(heads.build(heads.modernbert), peft_config=prompt)
    batch = first_batch(made)
    loss, gradients = loss_and_gradients(made, batch)
    truth = made.model(**batch).loss  # the first token of a text is predicted too, from the last virtual one
    truth.backward()
    expected = {name: value.grad for name, value in made.model.named_parameters() if value.requires_grad}
    assert loss == pytest.approx(truth.item(), rel=DENSE_TOLERANCE)
    assert worst(gradients, expected) < DENSE_TOLERANCE


@pytest.mark.parametrize("as_teacher", [False, True])
@pytest.mark.parametrize("name", heads.UNFIT)
def test_what_does_not_fit_is_refused_at_construction(name, as_teacher):
    make, reason = heads.UNFIT[name]
    model = heads.build(make)
    with pytest.raises(ValueError, match=reason) as refusal:
        trainer(
            warm_model() if as_teacher else model,
            "distill" if as_teacher else "sft",
            ref_model=model if as_teacher else None,
        )
    assert type(model).__name__ in str(refusal.value)


@pytest.mark.parametrize("name", heads.TRAINED)
def test_what_is_trained_beside_the_product_is_refused_unless_it_is_frozen(name):
    """Its start changes nothing, so the first loss would be right, and no later one."""
    model = heads.build(heads.TRAINED[name])
    with pytest.raises(ValueError, match=r"trains .* (it|these parameters) \(`requires_grad_\(False\)`\)"):
        trainer(model)
    model = heads.build(heads.TRAINED[name])
    next(value for part, value in model.named_parameters() if part.endswith("factor")).requires_grad_(False)
    check_equals_dense(trainer(model), None)
    check_equals_dense(trainer(warm_model(), "distill", ref_model=model), model)


def test_a_refusal_tells_both_numbers():
    with pytest.raises(ValueError, match=r"(\S+) becomes (\S+) in its logits and (\S+) in the fused loss") as refusal:
        trainer(heads.build(heads.of(heads.Squared)))
    product, own, ours = map(
        float, re.search(r": (\S+) becomes (\S+) in its logits and (\S+) in", str(refusal.value)).groups()
    )
    assert own == pytest.approx(product + 1e-4 * product**2, rel=1e-2) and ours == product


def test_small_logits_hide_no_soft_cap():
    """A cap of 30 changes logits of 0.01 by less than float32 can say; later in training they are not so small."""
    model = heads.build(heads.recurrent_gemma)
    model.config.logits_soft_cap = 30.0
    model.lm_head.weight.data.mul_(1e-3)
    made = trainer(model)
    model.lm_head.weight.data.mul_(1e5)
    check_equals_dense(made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["modernbert", "inkling", "capped_in_code", "llava_over_cohere"])
def test_half_precision_measures_the_same_numbers(name, dtype):
    found = []
    for model in (heads.build(heads.FITTING[name]), heads.build(heads.FITTING[name]).to(dtype)):
        add_target_head(model)
        check_head(model)
        found.append(vars(model)["_qtarget"].transform)
    assert found[0] is not None
    assert found[1].scale == pytest.approx(found[0].scale, rel=1e-7)
    assert (found[1].softcap, found[1].vocabulary) == (found[0].softcap, found[0].vocabulary)


class Drawing(heads.ScaledInCode):
    """Draws random numbers, counts its passes in a buffer and replaces another."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def before(self, hidden):
        self.passes += 1
        self.last = torch.rand(2)
        return super().before(hidden)


def test_the_check_leaves_no_trace():
    model = heads.build(heads.of(Drawing)).train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [value.requires_grad for value in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    last, children = model.last, dict(model.named_modules())
    add_target_head(model)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    check_head(model)
    assert vars(model)["_qtarget"].transform is not None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]
    assert [module.training for module in model.modules()] == modes
    assert [value.requires_grad for value in model.parameters()] == trained
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.last is last and dict(model.named_modules()) == children
    assert all(value.grad is None for value in model.parameters())
    assert "forward" not in vars(model.lm_head)


class NeedsMore(heads.ScaledInCode):
    """Cannot be run on text alone."""

    def forward(self, input_ids=None, attention_mask=None, picture=None, **kwargs):
        if picture is None:
            raise TypeError("no picture")
        return super().forward(input_ids, attention_mask)


def test_a_model_that_needs_more_than_text_is_looked_at_in_its_first_pass():
    made = trainer(heads.build(heads.of(NeedsMore)))
    assert vars(made.model)["_qtarget"].transform is None
    batch = dict(first_batch(made), picture=torch.ones(1))
    loss = made.compute_loss(made.model, dict(batch))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = made.model(**inputs).logits[:, :-1].flatten(0, 1)
    truth = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(truth.item(), rel=DENSE_TOLERANCE)


# --- heads whose weight is not there to be read ---


def quantized_head(form: str) -> LlamaForCausalLM:
    """bitsandbytes leaves the head alone, unless what it should leave alone is named and is something else."""
    config: BitsAndBytesConfig = {"int8": int8, "nf4": nf4}[form]()
    config.llm_int8_skip_modules = ["q_proj"]
    plain = wide()
    return LlamaForCausalLM.from_pretrained(
        None, config=plain.config, state_dict=plain.state_dict(), quantization_config=config, dtype=torch.float32
    )


@pytest.mark.parametrize("as_teacher", [False, True])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_quantized_head(form, as_teacher):
    lora = LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM")
    model = quantized_head(form)
    given = {"model": warm_model(), "ref_model": model} if as_teacher else {"model": model, "peft_config": lora}
    with pytest.raises(ValueError, match=r"`lm_head` of this LlamaForCausalLM is quantised .*llm_int8_skip_modules"):
        trainer(given.pop("model"), "distill" if as_teacher else "sft", **given)


def test_head_in_eight_bit_floats():
    model = warm_model()
    model.lm_head.weight.requires_grad_(False).data = model.lm_head.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"is quantised \(torch.float8_e4m3fn\)"):
        add_target_head(model)


def test_teacher_with_an_offloaded_head(tmp_path):
    warm_model(steps=12).save_pretrained(tmp_path / "teacher")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    placed = {"model": "cpu", "lm_head": "disk"}
    parted = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=placed, offload_folder=tmp_path / "offload"
    )
    for _ in range(2):  # a second trainer finds it as the first one did
        assert parted.lm_head.weight.is_meta
        check_equals_dense(trainer(warm_model(), "distill", ref_model=parted), whole)


def test_frozen_head_of_a_policy_that_is_offloaded(tmp_path):
    """Under LoRA a head need not stay on the device."""
    warm_model().save_pretrained(tmp_path / "policy")
    lora = LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    losses = []
    for placed in (None, {"model": "cpu", "lm_head": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "policy", device_map=placed, offload_folder=tmp_path / "offload"
        )
        torch.manual_seed(0)
        made = trainer(model, peft_config=lora)
        losses.append(made.compute_loss(made.model, dict(first_batch(made))).item())
    assert losses[0] == losses[1]
