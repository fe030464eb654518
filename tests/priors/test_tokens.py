"""A reference model means the same tokens by the policy's ids: it is looked up, compared, and refused or said."""

import json
import logging

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from training import check_equals_dense, make_trainer, train_target, warm_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors import tokens


SIZE = len(tiny.tokenizer())


def changed(change=lambda data: None, **options) -> PreTrainedTokenizerFast:
    """The tokenizer of the tests after a change of its file."""
    data = json.loads(tiny._tokenizer().backend_tokenizer.to_str())
    change(data)
    options = {"pad_token": "<pad>", "eos_token": "<eos>", "chat_template": tiny.CHAT_TEMPLATE} | options
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **options)


def swap(data) -> None:
    """Ids 9 and 300 change their tokens."""
    vocabulary = data["model"]["vocab"]
    first, second = (next(token for token, id in vocabulary.items() if id == number) for number in (9, 300))
    vocabulary[first], vocabulary[second] = 300, 9


def merge_later(data) -> None:
    data["model"]["merges"] = data["model"]["merges"][1:]


def saved(folder, tokenizer=None, **sizes) -> str:
    tiny.model(seed=5, **sizes).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def trainer_of(ref_model, method="distill", **arguments) -> QTargetSFTTrainer:
    model = arguments.pop("model", None) or warm_model()
    return make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), model, qtarget_config=method, ref_model=ref_model, **arguments
    )


@pytest.fixture
def said(caplog):
    """What the package has logged."""
    caplog.set_level(logging.INFO, logger="trl_qtarget")
    return lambda: "\n".join(record.getMessage() for record in caplog.records if "trl_qtarget" in record.name)


@pytest.mark.parametrize("loaded", [False, True], ids=["path", "loaded"])
def test_other_tokens_in_as_many_rows_are_refused(loaded, tmp_path):
    path = saved(tmp_path, changed(swap))
    reference = LlamaForCausalLM.from_pretrained(path) if loaded else path
    ours, theirs = (each.convert_ids_to_tokens(9) for each in (tiny.tokenizer(), changed(swap)))
    message = f"has another tokenizer than the policy: id 9 is {theirs!r} to it and {ours!r} to the policy, and 1 more"
    with pytest.raises(ValueError, match="`ref_model`") as error:
        trainer_of(reference)
    assert message in str(error.value)


def test_other_splits_of_the_same_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="splits text otherwise than the policy: in 'In 2024, 1234567") as error:
        trainer_of(saved(tmp_path, changed(merge_later)))
    assert "it has the token 'Ġ' where the policy has 'Ġa'" in str(error.value)
    # The remedy that it names.
    trainer_of(saved(tmp_path), processing_class=changed(merge_later))


def test_one_tokenizer_is_nothing_to_speak_of(tmp_path, said):
    trainer_of(saved(tmp_path, tiny.tokenizer(), vocab_size=SIZE + 128))
    assert said() == ""


def test_a_tokenizer_that_is_not_found_is_said(tmp_path, said):
    trainer_of(saved(tmp_path))
    trainer_of(tiny.model(seed=5))
    assert said().count("is not checked, and taken for granted: its tokenizer is not found") == 2
    assert "its name is not known" in said()


def test_an_empty_tokenizer_is_none(tmp_path, said):
    """What transformers makes of a configuration of Qwen2 without a tokenizer's files."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=SIZE, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    trainer_of(str(tmp_path))
    assert f"its tokenizer is not found ({tmp_path} has no files of one)" in said()


def test_another_chat_template_is_said_and_no_more(tmp_path, said):
    trainer_of(saved(tmp_path, changed(chat_template="{{ messages }}")))
    assert said().count("has another chat template than the policy, whose it reads.") == 1


def test_other_control_tokens_are_said_and_no_more(tmp_path, said):
    def rename(data) -> None:
        data["added_tokens"][2]["content"] = "<|user|>"
        data["model"]["vocab"]["<|user|>"] = data["model"]["vocab"].pop("<|im_start|>")

    trainer_of(saved(tmp_path, changed(rename)))
    message = "means something else by 1 control token of the policy: id 2 is '<|user|>' to it and '<|im_start|>' to"
    assert said().count(message) == 1


def test_a_tokenizer_that_fails_is_said(monkeypatch, tmp_path, said):
    monkeypatch.setattr(tokens.Tokens, "splits", lambda self, text: 1 / 0)
    trainer_of(saved(tmp_path, tiny.tokenizer()))
    assert "the tokenizers cannot be compared (ZeroDivisionError: division by zero)" in said()


def test_folder_of_an_adapter_has_the_tokenizer_of_its_base(tmp_path):
    base = saved(tmp_path / "base", changed(swap))
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert tokens.find_tokenizer(str(tmp_path / "adapter")).get_vocab() == changed(swap).get_vocab()


# --- sizes ---


QWEN = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def qwen(rows: int, seed: int, tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = QWEN | {"num_key_value_heads": 2, "initializer_range": 0.5}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=tied, **sizes)).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [(151_936, 152_064), (152_064, 151_936)], ids=["larger", "smaller"])
def test_a_pair_of_qwens_sizes_trains(rows, tied):
    ours, theirs = rows
    config = QTargetConfig("distill_hybrid", temperature=2.0) if tied else "target_sft"
    teacher = qwen(theirs, 1, tied)
    options = {"per_device_train_batch_size": 2}
    run = train_target(config, model=qwen(ours, 0, tied), ref_model=teacher, steps=2, options=options)
    assert run.moved()
    check_equals_dense(run.trainer, teacher)


NEW = ["<|system|>", "<|tool|>"]


def added() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    return tokenizer


@pytest.mark.parametrize("method", ["target_sft", "iw_sft", "distill", "asft"])
def test_tokens_that_the_teacher_has_no_row_for(method, said):
    """They have no prior probability, and in its context stands its end of text."""
    policy, teacher = tiny.model(vocab_size=SIZE + 2), tiny.model(seed=5)
    dataset = tiny.text_dataset()
    dataset = dataset.map(lambda row: {"text": f"{NEW[0]} {row['text']} {NEW[1]} so"})
    trainer = make_trainer(
        QTargetSFTTrainer, dataset, policy, qtarget_config=method, ref_model=teacher, processing_class=added()
    )
    message = f"`ref_model` has no row for 2 tokens of the policy ({NEW[0]!r}, {NEW[1]!r}): it gives them no "
    assert message + "probability, and reads its token 1 in their place." in said()

    def reads(input_ids, **inputs):
        return teacher(torch.where(input_ids < SIZE, input_ids, 1), **inputs)

    check_equals_dense(trainer, reads)
    trainer.train()


def test_a_teacher_without_a_token_to_read_is_refused():
    teacher = tiny.model(seed=5)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(teacher.config, name, None)
    new = added()
    new.eos_token, new.pad_token = NEW
    with pytest.raises(ValueError, match=r"`ref_model` has 320 embeddings, the policy 322, and no token to read in"):
        trainer_of(teacher, model=tiny.model(vocab_size=SIZE + 2), processing_class=new)
