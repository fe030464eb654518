"""Reference models that are not what a policy is: each works exactly or is refused, by name, before training."""

import copy
import logging

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from peft import AdaptionPromptConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from training import check_equals_dense, make_trainer, other_model, train_target, warm_model
from transformers import (
    AutoModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_qtarget import QTargetSFTTrainer


def trainer_of(ref_model, model=None, dataset=None, method="iw_sft", **arguments) -> QTargetSFTTrainer:
    return make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset() if dataset is None else dataset,
        warm_model() if model is None else model,
        qtarget_config=method,
        ref_model=ref_model,
        **arguments,
    )


SIZE = len(tiny.tokenizer())


# --- shared parameters ---


def student_of(teacher):
    student = copy.deepcopy(teacher)
    student.model.layers[0] = teacher.model.layers[0]
    return student


def test_student_of_its_teachers_modules_is_refused():
    teacher = other_model()
    student = student_of(teacher)
    with pytest.raises(
        ValueError, match=r"`ref_model` shares \d+ trained parameters with `model` \(`model\.layers\.0"
    ):
        trainer_of(teacher, student)
    assert all(value.requires_grad for value in student.parameters())


def test_a_view_of_the_same_memory_is_shared_too():
    teacher = other_model()
    student = copy.deepcopy(teacher)
    student.model.norm.weight = nn.Parameter(teacher.model.norm.weight.data)
    with pytest.raises(ValueError, match=r"shares 1 trained parameters with `model` \(`model\.norm\.weight`\)"):
        trainer_of(teacher, student)


def test_what_is_frozen_may_be_shared():
    teacher = other_model()
    student = student_of(teacher)
    student.model.layers[0].requires_grad_(False)
    run = train_target("iw_sft", model=student, ref_model=teacher)
    assert run.moved() and worst_of(run) > 0


def worst_of(run) -> float:
    return max((value - run.start[name]).abs().max().item() for name, value in run.weights.items())


# --- documents ---


TEACHERS = {
    "llama": other_model,
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=2)),
    "alibi": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True)
    ),
}


# Falcon does by its mask from transformers 5.24 on.
TELL_DOCUMENTS_APART = {"llama"} | ({"alibi"} if Version(transformers.__version__) >= Version("5.24") else set())


def teacher_of(kind: str):
    torch.manual_seed(5)
    teacher = TEACHERS[kind]().eval()
    if kind != "llama":
        with torch.no_grad():
            for value in teacher.parameters():
                value.mul_(4 if value.dim() > 1 else 1)
    return teacher


class WithoutPositions(BloomForCausalLM):
    """Its forward takes nothing that it does not know."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, labels=None, logits_to_keep=0):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}
        return super().forward(**given, labels=labels, logits_to_keep=logits_to_keep)


TEACHERS["nothing more"] = lambda: WithoutPositions(BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=2))


def test_packed_documents_of_a_prompt_tuned_teacher():
    tuned = get_peft_model(other_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    losses = []
    for options in ({}, {"packing": True, "max_length": 64}):
        trainer = trainer_of(tuned, method="distill", options={"per_device_train_batch_size": 24, **options})
        trainer.model.eval()
        losses.append(trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader())))).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", TEACHERS)
def test_packed_documents_are_those_of_padded_rows(kind):
    losses = []
    for options in ({}, {"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}):
        options = {"per_device_train_batch_size": 24, **options}
        trainer = trainer_of(teacher_of(kind), method="distill", options=options)
        trainer.model.eval()
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
        packed = options.keys() & {"packing", "padding_free"}
        assert trainer._prior._mixes_documents is ((kind not in TELL_DOCUMENTS_APART) if packed else None)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


# --- adapters ---


def test_folder_of_an_adapter_is_its_base_with_the_adapter(tmp_path):
    base = other_model()
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), lora)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    trainer = trainer_of(str(tmp_path / "adapter"))
    assert not any(value.requires_grad for value in trainer._prior.model.parameters())
    check_equals_dense(trainer, adapted.eval())
    # A policy with an adapter of its own on the same base keeps its own.
    trainer = trainer_of(str(tmp_path / "adapter"), model=copy.deepcopy(base), peft_config=lora)
    check_equals_dense(trainer, adapted.eval())


# --- what is no causal language model ---


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


OTHERS = {
    "headless": (lambda: other_model().model, "is a `LlamaModel`, which has no LM head"),
    "classifier": (lambda: LlamaForSequenceClassification(other_model().config), "which has no LM head"),
    "encoder-decoder": (t5, "an encoder-decoder model"),
    "compiled": (lambda: torch.compile(other_model()), "is compiled, so nothing can take the place of its head"),
    "module": (lambda: nn.Linear(3, 3), "is a `Linear`, which is no model of transformers"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_causal_language_model_is_refused(kind):
    make, why = OTHERS[kind]
    with pytest.raises(ValueError, match=f"`ref_model` .*{why}"):
        trainer_of(make())
    if kind != "module":
        with pytest.raises(ValueError, match=f"`model` .*{why}"):
            trainer_of(None, model=make(), method="sft")


def test_adapters_that_change_the_pass_are_refused_in_a_reference_too():
    adaption = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    with pytest.raises(ValueError, match="`ref_model` has an adapter of the kind ADAPTION_PROMPT"):
        trainer_of(get_peft_model(other_model(), adaption))


def test_encoder_decoder_policy_by_path(tmp_path):
    t5().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model` is a `T5ForConditionalGeneration`, an encoder-decoder model"):
        trainer_of(None, model=str(tmp_path), method="sft")


# --- positions ---


def gpt2(positions: int):
    return GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=positions))


def test_fewer_positions_than_a_text_has_tokens():
    with pytest.raises(ValueError, match=r"`ref_model` has 8 positions and a text has \d+ tokens: set `max_length`"):
        trainer_of(gpt2(8)).train()
    trainer_of(gpt2(64)).train()


def test_positions_behind_the_index_of_padding():
    """RoBERTa's table has two rows more than positions."""
    config = RobertaConfig(
        vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    config.intermediate_size, config.max_position_embeddings = 16, 10
    with pytest.raises(ValueError, match=r"`ref_model` has 8 positions"):
        trainer_of(RobertaForCausalLM(config)).train()


def test_starting_copy_with_too_few_positions_is_not_blamed_on_a_reference():
    with pytest.raises(ValueError, match=r"`model` has 8 positions"):
        trainer_of(None, model=gpt2(8)).train()


def test_rotary_positions_beyond_those_trained_are_told_once(caplog):
    teacher = other_model()
    teacher.config.max_position_embeddings = 8
    with caplog.at_level(logging.WARNING, logger="trl_qtarget"):
        trainer_of(teacher).train()
    assert caplog.text.count("was made for at most 8 positions") == 1


def test_folder_of_a_headless_model(tmp_path):
    AutoModel.from_config(other_model().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`ref_model` is a `LlamaModel`, which has no LM head"):
        trainer_of(str(tmp_path))
