"""A prior is one distribution: every module that samples while it trains is in evaluation mode, a linear one too."""

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn
from training import first_batch, make_trainer, other_model, warm_model
from transformers import PhimoeConfig, PhimoeForCausalLM

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.loss.body import inference


def phimoe() -> PhimoeForCausalLM:
    """Phi-3.5-MoE: its router is a linear layer that samples two of four experts, and shakes its inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    noise = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "initializer_range": 0.2}
    tokens = {"vocab_size": len(tiny.tokenizer()), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return PhimoeForCausalLM(PhimoeConfig(**sizes, **heads, **noise, **tokens)).eval()


@pytest.mark.parametrize("prior", ["base", "lagged"])
@pytest.mark.parametrize(
    "peft", [None, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")], ids=["full", "lora"]
)
def test_prior_of_a_model_whose_router_samples_is_one_distribution(prior, peft):
    config = QTargetConfig("asft", prior=prior)
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), phimoe(), qtarget_config=config, peft_config=peft)
    inputs = {name: value for name, value in first_batch(trainer).items() if name != "labels"}
    with torch.no_grad():
        truth = phimoe().base_model(**inputs).last_hidden_state
        trainer.model.train()
        assert not torch.equal(trainer.model.base_model(**inputs)[0], truth)  # the policy does sample
    torch.manual_seed(7)
    random_numbers = torch.get_rng_state()
    assert torch.equal(trainer._prior.states(inputs).hidden, truth)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(module.training for module in trainer.model.modules())


def test_a_teacher_whose_router_samples_is_one_distribution():
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="distill", ref_model=phimoe().train()
    )
    inputs = {name: value for name, value in first_batch(trainer).items() if name != "labels"}
    with torch.no_grad():
        truth = phimoe().base_model(**inputs).last_hidden_state
    assert torch.equal(trainer._prior.states(inputs).hidden, truth)


def test_only_linear_layers_of_bitsandbytes_stay_in_training_mode():
    pytest.importorskip("bitsandbytes")
    import quantized

    for form in quantized.FORMATS:
        model = quantized.quantized(form).train()
        with inference(model):
            training = [module for module in model.modules() if module.training]
            assert training and all(type(module).__module__.startswith("bitsandbytes.") for module in training)
        assert all(module.training for module in model.modules())
    model = other_model().train()
    model.lm_head = nn.Linear(16, 4)  # an ordinary one
    with inference(model):
        assert not any(module.training for module in model.modules())
