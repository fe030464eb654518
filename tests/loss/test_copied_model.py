"""A copy of a model that a trainer has taught is a copy: it runs its own weights and fills its own gradients."""

import copy
import inspect
import io

import pytest
import tiny
import torch
from peft import LoraConfig
from torch.optim.swa_utils import AveragedModel
from training import check_equals_dense, first_batch, make_trainer, train_target, warm_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.inspection.guest import no_trace
from trl_qtarget.priors.base import base_model_of


def trainer(model=None, method="sft", **arguments) -> QTargetSFTTrainer:
    return make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(8), model or warm_model(), qtarget_config=method, **arguments
    )


def lora() -> dict:
    return {"peft_config": LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)}


def averaged(model):
    return AveragedModel(model).module


def unpickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "averaged": averaged, "unpickled": unpickled}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_a_snapshot_does_not_move_with_the_model(way, peft):
    made = trainer(steps=3, **(lora() if peft else {}))
    before = made.model.eval()(IDS).logits
    snapshot = COPIES[way](made.model).eval()
    made.train()
    assert torch.equal(snapshot(IDS).logits, before)
    assert not torch.allclose(made.model.eval()(IDS).logits, before, atol=1e-2)


@pytest.mark.parametrize("after_training", [False, True])
@pytest.mark.parametrize("options", [{}, {"bf16": True}])
def test_a_copy_of_a_trainers_model_trains_itself(options, after_training):
    """With `bf16` Accelerate replaces the forward once more when training starts."""
    made = trainer(steps=1, options=options)
    if after_training:
        made.train()
    made.model.zero_grad()
    twin = copy.deepcopy(made.model)
    batch = first_batch(made)
    made.compute_loss(twin, dict(batch)).backward()
    assert all(value.grad is not None for value in twin.parameters())
    assert all(value.grad is None for value in made.model.parameters())
    with torch.no_grad():  # with weights of zero its predictions are uniform
        for value in twin.parameters():
            value.zero_()
        loss = made.compute_loss(twin, dict(batch))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(float(len(tiny.tokenizer())))).item(), rel=1e-6)


def test_a_copy_may_be_trained_by_another_trainer():
    made = trainer(steps=2)
    first = copy.deepcopy(made.model)
    made.train()
    again = trainer(copy.deepcopy(first), steps=2)
    check_equals_dense(again)
    again.train()
    for name, value in again.model.named_parameters():
        torch.testing.assert_close(value, made.model.get_parameter(name), rtol=0, atol=1e-6)


def test_a_model_may_have_several_trainers_one_after_the_other():
    model = warm_model()
    for method in ("sft", "dft", "sft"):
        made = trainer(model, method)
        check_equals_dense(made)
        assert vars(model)["_qtarget"].forward.__func__ is LlamaForCausalLM.forward


def test_a_model_stays_what_it_is(tmp_path):
    made = trainer()
    model, plain = made.model, warm_model()
    assert type(model) is LlamaForCausalLM
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert torch.equal(model.generate(IDS, max_new_tokens=4), plain.generate(IDS, max_new_tokens=4))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(reloaded(IDS).logits, plain(IDS).logits)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("peft", [False, True])
def test_no_trace_takes_everything_back(peft):
    model = warm_model()
    before = set(vars(model))
    with no_trace(model):
        made = trainer(model, **(lora() if peft else {}))
        assert {"forward", "_qtarget"} <= set(vars(base_model_of(made.model)))
    assert set(vars(model)) - before <= {"peft_config"}


def test_base_prior_of_a_policy_with_the_hooks_of_a_device_map(tmp_path):
    """The copy of the starting weights has hooks of its own, which fetch what is offloaded."""
    warm_model().save_pretrained(tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    policy.requires_grad_(False)
    policy.model.layers.requires_grad_(True)
    made = trainer(policy, {"method": "asft", "prior": "base"})
    copied = made._prior.causal_model
    assert copied is not policy and vars(copied)["_qtarget"].forward is not vars(policy)["_qtarget"].forward
    check_equals_dense(made, warm_model())


def test_the_starting_copy_is_taught_and_does_not_move():
    run = train_target({"method": "asft", "prior": "base"})
    prior = run.trainer._prior.causal_model
    check_equals_dense(run.trainer, warm_model())
    assert torch.equal(prior(IDS).logits, warm_model()(IDS).logits)
