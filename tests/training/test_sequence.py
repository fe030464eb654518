"""Batches that are cut at any token: what belongs to the next token stays with the one before, on whichever rank."""

import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers.trainer
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from training import make_trainer, warm_model
from transformers import MistralConfig, MistralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors.ulysses import check_attention, check_same_heads, document_mask
from trl_qtarget.training.batch import take_columns
from trl_qtarget.training.sequence import SplittableCollator, split_sequences


def cut(batch, pieces):
    """What DeepSpeed makes of a batch: labels are moved, then every tensor is cut into equal pieces."""
    batch = dict(batch)
    labels = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)
    batch["shift_labels"] = labels[:, 1:].contiguous()
    assert all(value.dim() == 2 for value in batch.values() if isinstance(value, torch.Tensor))
    return [
        {key: value.chunk(pieces, dim=1)[number] if torch.is_tensor(value) else value for key, value in batch.items()}
        for number in range(pieces)
    ]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_columns_of_pieces_are_those_of_whole_rows(packing):
    ids = [tiny.tokenizer()(text)["input_ids"] for text in tiny.sentences(12, seed=3)]
    weights = [[(7 * token % 5) / 4 for token in row] for row in ids]
    config = QTargetConfig(method=None, trust="importance", residual="prior", prior="base")
    trainer = make_trainer(
        QTargetSFTTrainer,
        Dataset.from_dict({"input_ids": ids, "token_weights": weights}),
        warm_model(),
        qtarget_config=config if packing else "cft",
        options={"packing": packing, "max_length": 50},
    )
    rows = [trainer.train_dataset[number] for number in range(3)]
    whole = dict(trainer.data_collator(rows))
    asked = {"weights": not packing, "sequences": True}
    truth = take_columns(dict(whole), "x", 320, **asked)
    collator = SplittableCollator(trainer.data_collator, multiple=4, documents=True)
    length = whole["labels"].size(1)
    pieces = [take_columns(piece, "x", 320, **asked) for piece in cut(collator(rows), 4)]

    def joined(values):
        return torch.cat([value.view(len(whole["labels"]), -1) for value in values], dim=1)[:, :length]

    labels = joined([piece.next_tokens.labels for piece in pieces])
    assert torch.equal(labels.flatten(), truth.next_tokens.labels)
    scored = labels != -100
    for name in ("weights", "sequences"):
        values = getattr(truth, name)
        if values is not None:  # of whole rows: each at its own token
            moved = torch.nn.functional.pad(values[:, 1:], (0, 1))
            found = joined([getattr(piece, name) for piece in pieces])
            assert torch.equal(found[scored], moved[scored])
    documents = joined([piece.sequences for piece in pieces])[scored]
    assert len(documents.unique()) == (sum(len(row["seq_lengths"]) for row in rows) if packing else 3)


def test_weights_are_not_rounded_to_the_precision_of_deepspeed():
    weights = torch.tensor([[0.1, 0.7]])
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(4), warm_model(), qtarget_config="sft")
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    prepared = trainer._prepare_inputs({"token_weights": weights, "shift_token_weights": weights, "image": weights})
    assert prepared["image"].dtype == torch.bfloat16
    assert torch.equal(prepared["token_weights"], weights) and torch.equal(prepared["shift_token_weights"], weights)


def test_attention_keeps_documents_apart():
    mask = document_mask(torch.tensor([[0, 1, 2, 0, 1, 0]]))
    document = torch.tensor([0, 0, 0, 1, 1, 2])
    expected = (document[:, None] == document[None]) & torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(mask, expected[None, None])


def split(implementation="sdpa", **sizes):
    """An accelerator that splits sequences over two ranks, as far as the refusals look at one."""
    sizes = {"sp_size": 2, "cp_size": 1} | sizes
    handler = SimpleNamespace(sp_attn_implementation=implementation)
    enabled = {f"{name}_enabled": sizes[f"{name}_size"] > 1 for name in ("sp", "cp")}
    zero = {"zero_optimization": {"stage": 3, "reduce_scatter": False}}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=zero))
    return SimpleNamespace(parallelism_config=SimpleNamespace(sp_handler=handler, **sizes, **enabled), state=state)


def arguments(**options):
    return SimpleNamespace(**{"packing": False, "eval_packing": False, "per_device_train_batch_size": 2} | options)


def test_refusals_of_a_split():
    model, collator = warm_model(), DataCollatorForLanguageModeling(0)
    prompts = get_peft_model(warm_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    one_row = DataCollatorForLanguageModeling(0, padding_free=True)
    with pytest.raises(ValueError, match="`peft_config` is of prompt learning"):
        split_sequences(split(), prompts, arguments(), collator)
    with pytest.raises(ValueError, match="`per_device_train_batch_size=2`: a packed or padding-free batch is one row"):
        split_sequences(split(), model, arguments(), one_row)
    with pytest.raises(ValueError, match="`reduce_scatter=False` of ZeRO-3"):
        split_sequences(split(), model, arguments(), collator)
    with pytest.raises(ValueError, match="`cp_size` hands attention no mask"):
        split_sequences(split(sp_size=1, cp_size=2), model, arguments(packing=True), collator)


def test_refused_reference_models():
    policy = warm_model()
    policy.set_attn_implementation("sdpa")
    check_same_heads(policy, policy, split())
    with pytest.raises(ValueError, match="`ref_model` computes attention by 'eager'"):
        check_same_heads(warm_model(), policy, split())
    other = tiny.model(num_attention_heads=2)
    other.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"`ref_model` has \(2, 2, 8\) for num_attention_heads"):
        check_same_heads(other, policy, split())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(vocab_size=32, num_key_value_heads=2, sliding_window=8, **sizes))
    with pytest.raises(ValueError, match="`model` has layers of the kind sliding_attention"):
        check_attention("model", windowed, split())
    check_attention("model", windowed, split("flash_attention_2"))


def test_deepspeed_and_transformers_have_what_a_split_takes_hold_of():
    """A prior's pass finds DeepSpeed's attention behind the function that transformers calls."""
    ulysses = pytest.importorskip("deepspeed.runtime.sequence_parallel.ulysses_sp")
    register = ulysses.UlyssesSPAttentionHF.register_with_transformers.__func__.__code__
    assert "uattn" in register.co_cellvars
    assert "disable_in_eval" in inspect.signature(ulysses.UlyssesSPAttentionHF.__init__).parameters
    batches = [{"input_ids": torch.zeros(1, 2)}]
    loader = ulysses.UlyssesSPDataLoaderAdapter(batches, sp_rank=0, sp_group=None, sp_world_size=1, device="cpu")
    assert loader.dl is batches and not loader.micro_batches and next(loader.iter) is batches[0]
    assert callable(transformers.trainer.skip_first_batches)
