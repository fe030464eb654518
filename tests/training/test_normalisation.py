"""The loss is the mean over the labels that are scored, whatever the model's class, and however a step is divided."""

from itertools import product

import peft
import pytest
import tiny
import tiny_vision
import torch
from cells import Stranger
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from thinned import one_of_each, thinned
from training import SAME, first_batch, make_trainer, train_target, warm_model, worst
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


def stranger():
    return Stranger.of(warm_model())


def of_family(name: str):
    """A class that sees, on text alone; and its rows have other numbers of labels still."""
    family = tiny_vision.FAMILIES[name]
    return lambda: family.model()


def gpt2():
    """An architecture whose class is not called `...ForCausalLM`."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": len(tiny.tokenizer()), "n_positions": 256, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, pad_token_id=0, eos_token_id=1, **off))


CLASSES = {
    "llama": warm_model,
    "gpt2": gpt2,
    "stranger": stranger,
    "gemma3": of_family("gemma3"),
    "qwen2_5_vl": of_family("qwen2_5_vl"),
    "qwen3_vl_moe": of_family("qwen3_vl_moe"),
}


def uneven() -> Dataset:
    """Four rows: three with one label each, one with many."""
    tokens = tiny.tokenizer()(tiny.sentences(4, seed=3, longest=20))["input_ids"]
    rows = [row[:3] for row in tokens[:3]] + [tokens[3] * 3]
    labels = [[-100] * (len(row) - 1) + row[-1:] for row in rows[:3]] + [[-100, *rows[3][1:]]]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


BATCH = {"per_device_train_batch_size": 4}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
# float32: each side sums the same four gradients in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", CLASSES)
def test_accumulation_is_the_batch_for_every_class(name):
    """Of classes with `accepts_loss_kwargs = False`, transformers would average each micro-batch by itself."""
    options = {"max_grad_norm": 0.0, "router_aux_loss_coef": 0.0}
    one, other = (
        train_target("sft", uneven(), CLASSES[name](), steps=1, options=options | layout)
        for layout in (BATCH, ONE_BY_ONE)
    )
    assert other.column("loss") == pytest.approx(one.column("loss"), rel=TOLERANCE)
    assert one.column("loss") == pytest.approx(one.column("target/nll"), rel=TOLERANCE)
    ways = [{key: run.weights[key] - run.start[key] for key in run.start} for run in (one, other)]
    moved = {key for key, way in ways[0].items() if way.abs().max() > 0}
    assert moved
    way, truth = ({key: each[key] for key in moved} for each in reversed(ways))
    assert worst(way, truth) < TOLERANCE


@pytest.mark.parametrize("name", ["stranger", "gemma3"])
def test_evaluation_knows_neither_class_nor_accumulation(name):
    def evaluated(**options):
        trainer = make_trainer(
            QTargetSFTTrainer,
            uneven(),
            CLASSES[name](),
            qtarget_config="sft",
            eval_dataset=uneven(),
            options=options,
        )
        return trainer.evaluate()

    plain, accumulated = evaluated(), evaluated(gradient_accumulation_steps=8)
    assert accumulated["eval_loss"] == pytest.approx(plain["eval_loss"], rel=SAME)
    assert plain["eval_loss"] == pytest.approx(plain["eval_target/nll"], rel=SAME)  # one batch


# --- what is counted is what is scored ---

PADDING_FREE = {"padding_free": True, "max_length": None}
LAYOUTS = {
    "padded": {},
    "padding_free": PADDING_FREE,
    "padding_free_multiple": PADDING_FREE | {"pad_to_multiple_of": 64},
    "packed": {"packing": True, "max_length": 48},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
}


_CLASSES = list(product(["llama", "stranger", "gpt2"], LAYOUTS))


@pytest.mark.parametrize(("name", "layout"), thinned(_CLASSES, lambda *pair: pair in one_of_each(_CLASSES)))
def test_the_loss_is_the_nll_for_every_class(name, layout):
    """transformers counts the first label of a row too, which nothing predicts, for a class that it does not know."""
    for micro in (1, 2):
        options = LAYOUTS[layout] | {"gradient_accumulation_steps": micro}
        run = train_target("sft", model=CLASSES[name](), steps=2, options=options)
        assert run.column("loss") == pytest.approx(run.column("target/nll"), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "stranger", "gpt2"])
def test_padded_and_padding_free_are_one_loss(name):
    padded, free = (
        train_target("asft", model=CLASSES[name](), ref_model=CLASSES[name](), steps=1, options=options)
        for options in ({}, PADDING_FREE)
    )
    assert free.column("loss") == pytest.approx(padded.column("loss"), rel=1e-5)


ADAPTERS = {
    "full": None,
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "encoder": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
if hasattr(peft, "CartridgeConfig"):
    ADAPTERS["cartridge"] = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
TARGETS = {
    "none": {"qtarget_config": "dft"},
    "policy": {"qtarget_config": QTargetConfig("target_sft", prior="policy")},
    "base": {"qtarget_config": QTargetConfig("asft", prior="base")},
    "model": {"qtarget_config": "asft", "ref_model": warm_model},
    "lagged": {"qtarget_config": QTargetConfig("psft", prior_sync_steps=2)},
}


def counted_and_scored(trainer) -> tuple[int, int]:
    batch = first_batch(trainer)
    counted = int(trainer._get_num_items_in_batch([batch], torch.device("cpu")))
    with torch.no_grad():
        request = trainer.target_request(batch)
        return counted, int(trainer.model(**batch, qtarget=request).tokens.scored.sum())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_counted_is_what_is_scored(adapter, target):
    """Virtual tokens predict the first token of a row, for the policy and for a prior that has them too."""
    arguments = {name: value() if callable(value) else value for name, value in TARGETS[target].items()}
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), warm_model(), peft_config=ADAPTERS[adapter], **arguments
    )
    counted, scored = counted_and_scored(trainer)
    assert counted == scored
    batch = first_batch(trainer)
    labels, first = (int((part != -100).sum()) for part in (batch["labels"], batch["labels"][:, 0]))
    virtual = adapter in ("prompt", "encoder") and target in ("none", "policy", "lagged")
    assert first == len(batch["labels"]) and scored == (labels if virtual else labels - first)


@pytest.mark.parametrize("separated", [True, False], ids=["transformers", "of_ones_own"])
def test_collators_of_others_are_counted_as_scored(separated):
    """A first label of a document that a collator leaves in is predicted by the document before, and counted."""
    flatten = DataCollatorWithFlattening(return_tensors="pt")

    def own(examples):
        batch = flatten(examples)
        return batch | {"labels": batch["input_ids"].clone()}

    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model(),
        qtarget_config="sft",
        data_collator=flatten if separated else own,
    )
    counted, scored = counted_and_scored(trainer)
    tokens = first_batch(trainer)["input_ids"].numel()
    assert counted == scored == tokens - (4 if separated else 1)


def test_labels_that_are_shifted_already_are_all_scored():
    def shifted(examples):
        ids = torch.tensor([example["input_ids"][:3] for example in examples])
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=7)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "shift_labels": labels}

    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="sft", data_collator=shifted
    )
    assert counted_and_scored(trainer) == (12, 12)
