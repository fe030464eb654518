"""An inspection is a guest: it takes what it is given as it is, names it as its owner does, and leaves no trace."""

import copy
import logging
import random

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from training import make_trainer, sft_config, warm_model
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.inspection.callback import InspectionCallback
from trl_qtarget.inspection.collect import ROW_COLUMN, inspect_target
from trl_qtarget.inspection.suspicious import suspicious_tokens
from trl_qtarget.inspection.words import vocabulary


def inspect(model=None, methods=("dft",), dataset=None, **arguments):
    arguments.setdefault("processing_class", tiny.tokenizer())
    dataset = tiny.prompt_dataset(3) if dataset is None else dataset
    return inspect_target(model or warm_model(), dataset, methods, progress=False, **arguments)


# --- what it is given ---


@pytest.mark.parametrize("adapters", [False, True])
def test_policy_may_be_a_path(tmp_path, adapters):
    model = warm_model()
    model.save_pretrained(tmp_path / "base")
    if adapters:
        torch.manual_seed(0)
        model.name_or_path = str(tmp_path / "base")
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    found = inspect(str(tmp_path / "model"), processing_class=None)
    for example, other in zip(found["examples"], inspect(model)["examples"], strict=True):
        assert example["tokens"] == other["tokens"] and example["scored"] == other["scored"]
        assert example["nll"] == pytest.approx(other["nll"], rel=1e-4)
    assert found["model"] == str(tmp_path / "model")
    assert (found["reference"] is not None) == adapters


def test_labels_stand_where_they_stand_behind_virtual_tokens():
    torch.manual_seed(0)
    peft = get_peft_model(warm_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for dataset in (tiny.text_dataset(3), tiny.prompt_dataset(3)):
        for example in inspect(peft, ["dft", "target_sft"], dataset)["examples"]:
            labels = [example["tokens"][place] for place in example["scored"]]
            assert labels == [row[0] for row in example["alternatives"]]
            assert example["scored"][-1] == len(example["tokens"]) - 1


def test_examples_keep_their_numbers_when_others_are_dropped():
    rows = tiny.prompt_dataset(4)
    prompts = [row if number else "word " * 40 for number, row in enumerate(rows["prompt"])]
    rows = Dataset.from_dict({"prompt": prompts, "completion": rows["completion"]})
    args = sft_config(max_length=24)
    assert [example["name"] for example in inspect(dataset=rows, args=args)["examples"]] == ["1", "2", "3"]
    named = rows.add_column(ROW_COLUMN, [10, 20, 30, 40])
    assert [example["name"] for example in inspect(dataset=named, args=args)["examples"]] == ["20", "30", "40"]


def test_a_stream_is_taken_whole():
    rows = tiny.text_dataset(3)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert inspect(dataset=stream)["examples"] == inspect(dataset=rows)["examples"]


def test_settings_of_a_training_do_not_matter():
    args = SFTConfig("unused", packing=True, max_length=64, push_to_hub=True, use_cpu=True, bf16=False)
    args.eval_strategy = "steps"
    assert inspect(args=args)["examples"]


def test_precision_is_that_of_a_training():
    model = warm_model()
    found = inspect(model, ["asft"], ref_model=copy.deepcopy(model), args=sft_config(bf16=True))
    exact = inspect(model, ["asft"], ref_model=copy.deepcopy(model))
    for example, other in zip(found["examples"], exact["examples"], strict=True):
        assert example["p"] == example["prior"]
        assert example["p"] != other["p"], "in bfloat16"
    AcceleratorState._reset_state()


def test_methods_are_told_apart():
    variants = [QTargetConfig("target_sft", eta=0.3), QTargetConfig("target_sft", eta=0.6), "dft"]
    found = inspect(methods=variants, ref_model=warm_model(steps=30))
    assert [method["title"] for method in found["methods"]] == ["target_sft eta=0.3", "target_sft eta=0.6", "dft"]
    assert suspicious_tokens(found, 1)[0]["method"] == "target_sft eta=0.6"


# --- words ---


def test_words_keep_their_spaces():
    """Decoders of Llama 2 and Mistral strip the space before the first token they are given."""
    pieces = ["<unk>", "▁", "a", "▁a", "▁the", "the", "▁model", "<0xE2>"]
    inner = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    words = vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), range(len(pieces)))
    assert [words[str(number)] for number in (3, 4, 5, 6)] == [" a", " the", "the", " model"]
    assert words["7"] == "⟨<0xE2>⟩"


def test_pieces_of_letters_are_bytes():
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("é€", add_special_tokens=False)
    words = vocabulary(tokenizer, ids)
    assert "".join(words[str(number)] for number in ids) == "⟨C3⟩⟨A9⟩⟨E2⟩⟨82⟩⟨AC⟩"
    tokenizer.add_tokens(AddedToken("\ufffd"))
    assert vocabulary(tokenizer, [len(tokenizer) - 1]) == {str(len(tokenizer) - 1): "\ufffd"}


# --- no trace ---


def test_models_and_random_numbers_are_left_as_they_were():
    model, reference = warm_model(), warm_model(steps=30)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3), random.seed(3)
    inspect(model, ["asft"], ref_model=reference)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for each in (model, reference):
        assert "forward" not in vars(each) and not each.model_tags
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.zero_()
    assert not copied(torch.tensor([[1, 2]])).logits.any(), "the copy runs its own weights"


def test_a_training_in_any_precision_may_follow(tmp_path):
    AcceleratorState._reset_state()
    inspect()
    args = SFTConfig(str(tmp_path), bf16=True, use_cpu=True, report_to="none")
    trainer = QTargetSFTTrainer(
        warm_model(), args, train_dataset=tiny.text_dataset(), processing_class=tiny.tokenizer()
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert inspect()["examples"], "in the precision that is set by now"
    AcceleratorState._reset_state()


# --- during a training ---


def test_a_page_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), warm_model(), options={"output_dir": str(tmp_path)}, steps=2
    )
    trainer.add_callback(InspectionCallback(trainer, tiny.text_dataset(2), every=1))
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING, "trl_qtarget"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "No inspection page of step 0: `model` gives NaN" in caplog.text


def test_examples_are_formatted_as_the_training_formats_them(tmp_path):
    rows = Dataset.from_dict({"words": tiny.text_dataset(4)["text"]})
    trainer = make_trainer(
        QTargetSFTTrainer,
        rows,
        warm_model(),
        options={"output_dir": str(tmp_path)},
        formatting_func=lambda row: row["words"],
    )
    assert len(InspectionCallback(trainer, rows.select(range(2)), every=1).rows) == 2
