"""What the package relies on inside TRL, transformers, PEFT and accelerate: one test each.

A new release of one of them that breaks the package fails here first, in a test that says which promise was broken.
"""

import dataclasses
import inspect

import pytest
import tiny
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from training import (
    REFUSES_AUX_LOSS,
    first_batch,
    make_trainer,
    sft_config,
    trainable,
    warm_model,
)
from transformers import TrainerCallback
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.loss.head import add_target_head


def sft_trainer(**arguments) -> SFTTrainer:
    return make_trainer(SFTTrainer, tiny.text_dataset(), warm_model(), **arguments)


# --- TRL: the trainer ---


def test_trl_replaces_forward_in_init_and_we_put_the_original_back():
    """Its forward is bound to the model that it was made for, so a copy of the model would run that one."""
    plain, theirs = warm_model(), sft_trainer()
    assert "forward" in vars(theirs.model)
    add_target_head(theirs.model)
    own = vars(theirs.model)["_qtarget"].forward
    assert own.__func__ is type(plain).forward and own.__self__ is theirs.model
    ours = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="sft").model
    assert "forward" in vars(ours) and "forward" not in vars(plain)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(ours(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)


def test_trl_positional_order_of_the_trainer():
    names = list(inspect.signature(SFTTrainer.__init__).parameters)
    assert names[:3] == ["self", "model", "args"]
    assert {"train_dataset", "eval_dataset", "compute_loss_func", "peft_config"} <= set(names)
    assert not {"qtarget_config", "ref_model"} & set(names)


def test_trl_prepare_dataset_signature():
    names = list(inspect.signature(SFTTrainer._prepare_dataset).parameters)
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert names == expected


def test_trl_prepare_dataset_without_packing_or_length_only_tokenizes_and_keeps_columns():
    trainer = sft_trainer()
    args = dataclasses.replace(trainer.args, max_length=None, shuffle_dataset=False)
    data = tiny.text_dataset(6).add_column("mine", [[number] for number in range(6)])
    prepared = trainer._prepare_dataset(data, trainer.processing_class, args, False, None, "train")
    assert {"input_ids", "labels", "mine"} <= set(prepared.column_names)
    assert list(prepared["mine"]) == list(data["mine"])
    tokens = tiny.tokenizer()([text + "<eos>" for text in data["text"]])["input_ids"]
    assert list(prepared["input_ids"]) == list(prepared["labels"]) == tokens


def test_trl_signature_columns():
    trainer = sft_trainer()
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns == ["input_ids", "labels", "seq_lengths"]


def test_trl_trainer_does_not_declare_how_its_loss_is_scaled():
    """Left None, transformers takes a loss with `num_items_in_batch` as divided by all accumulation steps."""
    trainer = sft_trainer()
    assert getattr(trainer, "loss_is_scaled_for_ga", None) is None
    assert trainer.model_accepts_loss_kwargs


@pytest.mark.parametrize("cls", [SFTTrainer, QTargetSFTTrainer])
def test_trl_metrics_are_lists_that_log_averages_and_clears(cls):
    trainer = make_trainer(cls, tiny.text_dataset(), warm_model(), steps=1)
    trainer.model.train()
    trainer._metrics["train"]["mine"] = [1.0, 2.0]
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["mine"] == 1.5
    assert not trainer._metrics["train"]


def test_trl_trainer_attributes():
    trainer = sft_trainer()
    own = () if REFUSES_AUX_LOSS else ("router_aux_loss_coef",)
    for name in ("aux_loss_enabled", "padding_free", *own):
        assert hasattr(trainer, name), name
    trainer.train()
    assert trainer.current_gradient_accumulation_steps == 1
    assert trainer.get_tp_size() == 1


def test_trl_dft_is_a_loss_type_and_not_the_default():
    assert sft_config(loss_type="dft").loss_type == "dft"
    assert sft_config().loss_type != "dft"


# --- TRL: data ---


def test_trl_collator_fields():
    names = [field.name for field in dataclasses.fields(DataCollatorForLanguageModeling)]
    assert {"pad_token_id", "padding_free", "pad_to_multiple_of", "return_tensors"} <= set(names)


def test_trl_collator_pads_on_the_right_and_ignores_unknown_columns():
    rows = [{"input_ids": [5, 6, 7], "mine": [1, 2, 3]}, {"input_ids": [8, 9], "mine": [4, 5]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]


def test_trl_padding_free_collator_starts_each_document_at_position_zero():
    rows = [{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}, {"input_ids": [8, 9], "seq_lengths": [2]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 9]]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_trl_packs_every_list_column_alike(strategy):
    rows = [list(range(start, start + length)) for start, length in ((10, 7), (20, 3), (30, 2), (40, 5))]
    data = Dataset.from_dict({"input_ids": rows, "mine": [[token / 2 for token in row] for row in rows]})
    packed = pack_dataset(data, 5, strategy, {})
    assert [[2 * value for value in row] for row in packed["mine"]] == list(packed["input_ids"])
    assert ("seq_lengths" in packed.column_names) == (strategy != "wrapped")


# --- transformers ---


def test_transformers_calls_on_step_end_after_counting_the_step():
    seen = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, model.lm_head.weight.detach().clone()))

    trainer = sft_trainer(steps=2, callbacks=[Recorder()])
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert [step for step, _ in seen] == [1, 2]
    assert not torch.equal(seen[0][1], before)
    assert torch.equal(seen[1][1], trainer.model.lm_head.weight)


def test_transformers_saves_and_loads_the_optimizer_with_the_checkpoint_directory(tmp_path):
    calls = []

    class Recording(SFTTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            super()._save_optimizer_and_scheduler(output_dir)
            calls.append(("save", output_dir))

        def _load_optimizer_and_scheduler(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            calls.append(("load", checkpoint, self.model.lm_head.weight.detach().clone()))

    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}

    def trainer():
        return make_trainer(Recording, tiny.text_dataset(), warm_model(), steps=4, options=options)

    first = trainer()
    first.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    assert [call[:2] for call in calls] == [("save", checkpoint), ("save", str(tmp_path / "checkpoint-4"))]
    calls.clear()
    trainer().train(resume_from_checkpoint=checkpoint)
    assert calls[0][:2] == ("load", checkpoint)
    # The checkpoint's weights are in the model by then: it has left the starting weights.
    assert not torch.equal(calls[0][2], warm_model().lm_head.weight)


def test_transformers_writes_every_model_through_save_model(tmp_path):
    saved = []

    class Recording(SFTTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            saved.append(output_dir)
            super().save_model(output_dir, _internal_call)

    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(Recording, tiny.text_dataset(), warm_model(), steps=1, options=options)
    trainer.train()
    trainer.save_model()
    assert saved == [str(tmp_path / "checkpoint-1"), None]


def test_transformers_counts_items_without_the_first_label():
    trainer = sft_trainer()
    batch = first_batch(trainer)
    count = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
    assert count == 2 * (batch["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("make", [tiny.model, tiny.moe_model], ids=["llama", "moe"])
def test_transformers_base_model_gives_what_the_head_reads(make):
    model = warm_model(make)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "use_cache": False}
    hidden = model.base_model(**inputs).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(**inputs).logits)


def test_transformers_positions_alone_separate_packed_documents():
    model = warm_model()
    packed = model.base_model(
        torch.tensor([[5, 6, 7, 8, 9]]), position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False
    ).last_hidden_state
    alone = model.base_model(torch.tensor([[8, 9]]), use_cache=False).last_hidden_state
    torch.testing.assert_close(packed[:, 3:], alone, rtol=0, atol=1e-5)


# --- PEFT ---


def lora(**options) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0, **options
    )


PEFT_CONFIGS = {
    "lora": lora(),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_peft_disable_adapter_gives_the_base_model_and_restores(name):
    model = get_peft_model(warm_model(), PEFT_CONFIGS[name]).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    before, names = model(**inputs).logits, list(trainable(model))
    with torch.no_grad(), model.disable_adapter():
        off = model(**inputs).logits
    assert torch.equal(off, warm_model()(**inputs).logits)
    assert torch.equal(model(**inputs).logits, before)
    assert list(trainable(model)) == names
    assert not torch.equal(off, before[:, -4:])


def test_peft_disable_adapter_restores_after_an_error():
    model = get_peft_model(warm_model(), lora()).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    before = model(**inputs).logits
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(model(**inputs).logits, before)


def test_peft_disable_adapter_turns_trained_modules_off():
    peft = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(warm_model(), peft)
    live = model.get_base_model().get_output_embeddings().weight
    with torch.no_grad():
        live += 1
    with model.disable_adapter():
        assert torch.equal(model.get_base_model().get_output_embeddings().weight, warm_model().lm_head.weight)
    assert model.get_base_model().get_output_embeddings().weight is live


def test_peft_base_model_is_the_causal_model():
    base = warm_model()
    model = get_peft_model(base, lora())
    assert is_peft_model(model) and not is_peft_model(base)
    assert model.get_base_model() is base
    assert isinstance(base.base_model.layers[0].self_attn.q_proj, torch.nn.Module)


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_peft_passes_unknown_arguments_to_the_base_model(name):
    seen = []
    base = warm_model()
    original = base.forward
    model = get_peft_model(base, PEFT_CONFIGS[name])
    base.forward = lambda *args, qtarget=None, **kwargs: seen.append(qtarget) or original(*args, **kwargs)
    model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2, dtype=torch.long), qtarget="request")
    assert seen == ["request"]
