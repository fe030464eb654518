"""Scale and soft-cap of the logits: read from the configuration attributes that TRL reads, and used as models do."""

import pytest
import tiny
import torch
import trl.trainer.utils
from training import DENSE_TOLERANCE, first_batch, loss_and_gradients, make_trainer, train_target, warm_model, worst
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
)
from trl import SFTTrainer

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.loss.head import head_of
from trl_qtarget.loss.probe import read_logit_transform


def sizes(**overrides):
    return {
        "vocab_size": len(tiny.tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "attn_implementation": "eager",
        "initializer_range": 0.5,
    } | overrides


def build(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


TRANSFORMED = {
    "gemma2": (
        lambda: build(Gemma2ForCausalLM, Gemma2Config(**sizes(head_dim=4, final_logit_softcapping=3.0))),
        (1.0, 3.0),
    ),
    "gemma3": (
        lambda: build(Gemma3ForCausalLM, Gemma3TextConfig(**sizes(head_dim=4, final_logit_softcapping=2.0))),
        (1.0, 2.0),
    ),
    "cohere": (lambda: build(CohereForCausalLM, CohereConfig(**sizes(logit_scale=0.25))), (0.25, None)),
    "granite": (lambda: build(GraniteForCausalLM, GraniteConfig(**sizes(logits_scaling=8.0))), (0.125, None)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_logit_transform_is_that_of_the_model(name):
    make, transform = TRANSFORMED[name]
    model = make()
    assert read_logit_transform(model.config) == transform
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model.base_model(ids).last_hidden_state[0] @ model.get_output_embeddings().weight.T
        head_of(model).transform(logits)
        torch.testing.assert_close(logits, model(ids).logits[0], rtol=1e-5, atol=1e-5)


ATTRIBUTES = [
    ("any", {}, (1.0, None)),
    ("any", {"logit_scale": None}, (1.0, None)),
    ("any", {"logit_scale": 0.0}, (0.0, None)),
    ("any", {"output_multiplier": 0.5, "final_logit_softcapping": 7.0}, (0.5, 7.0)),
    ("any", {"lm_head_multiplier": 0.3}, (0.3, None)),
    ("any", {"logit_scale": 2.0, "logits_scaling": 4.0}, (2.0, None)),
    ("any", {"logits_scaling": 4.0}, (0.25, None)),
    ("hyperclovax", {"logits_scaling": 4.0}, (4.0, None)),
]


@pytest.mark.parametrize(("model_type", "attributes", "transform"), ATTRIBUTES)
def test_logit_transform_attributes_are_read_as_in_trl(model_type, attributes, transform):
    model = warm_model()
    model.config.model_type = model_type
    for name, value in attributes.items():
        setattr(model.config, name, value)
    assert read_logit_transform(model.config) == transform
    # TRL's fused head on the same configuration scores the labels alike; its name is TRL's since 1.15.
    add_fused_lm_head = getattr(trl.trainer.utils, "add_fused_lm_head", None)
    if add_fused_lm_head is None:
        pytest.skip("this TRL has another fused head")
    add_fused_lm_head(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = model(ids, labels=ids, fused_lm_head=True).log_probs
        logits = model.base_model(ids).last_hidden_state @ model.lm_head.weight.T
        head_of(model).transform(logits)
    ours = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "loss_type"), [("sft", "nll"), ("dft", "dft")])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_logits_train_as_in_trl(name, method, loss_type):
    make, _ = TRANSFORMED[name]
    ours = make_trainer(QTargetSFTTrainer, tiny.text_dataset(4), make(), qtarget_config=method)
    theirs = make_trainer(SFTTrainer, tiny.text_dataset(4), make(), options={"loss_type": loss_type})
    batch = first_batch(ours)
    loss, gradients = loss_and_gradients(ours, batch)
    truth, expected = loss_and_gradients(theirs, batch)
    assert loss == pytest.approx(truth, rel=1e-6)
    assert worst(gradients, expected) < DENSE_TOLERANCE


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_logits_of_a_reference_model(name):
    """Policy and reference each keep their own transform."""
    make, _ = TRANSFORMED[name]
    run = train_target("distill", ref_model=make(), steps=2)
    batch = first_batch(run.trainer)
    loss, _ = loss_and_gradients(run.trainer, batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p, q = (model(**inputs).logits[:, :-1].log_softmax(-1) for model in (run.trainer.model, make()))
    scored = batch["labels"][:, 1:] != -100
    assert loss == pytest.approx(-(q.exp() * p).sum(-1)[scored].mean().item(), rel=DENSE_TOLERANCE)
