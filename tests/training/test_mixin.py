"""`QTargetMixin` over transformers' own `Trainer`: it trains as `QTargetSFTTrainer` does on the same batches."""

import functools
import json
import re

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training import SAME, make_trainer, sft_config, trainable, warm_model, worst
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig

from trl_qtarget import InspectionCallback, QTargetMixin, QTargetSFTTrainer


class QTargetTrainer(QTargetMixin, Trainer):
    pass


class Stubborn(Trainer):
    """Says of its loss what is not true of the target's."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class QTargetStubborn(QTargetMixin, Stubborn):
    pass


def arguments_of(args: SFTConfig) -> TrainingArguments:
    """The same training, without what is TRL's."""
    own = {name: value for name, value in args.to_dict().items() if name in TrainingArguments.__dataclass_fields__}
    return TrainingArguments(**own)


@functools.cache
def rows(count: int = 24, seed: int = 1) -> Dataset:
    """Tokenised pairs, of which the completion is learned."""
    tokenizer, found = tiny.tokenizer(), []
    for example in tiny.prompt_dataset(count, seed):
        prompt, completion = (tokenizer(example[name])["input_ids"] for name in ("prompt", "completion"))
        found.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return Dataset.from_list(found)


def plain(model, args, cls=QTargetTrainer, **arguments):
    tokenizer = tiny.tokenizer()
    given = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "processing_class": tokenizer} | arguments
    trainer = cls(model, args, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def lora_model():
    model = warm_model()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))


CASES = {
    "target_sft, base under adapters": ({"method": "target_sft", "prior": "base"}, lora_model),
    "iw_sft, lagged": ({"method": "iw_sft", "prior": "lagged", "prior_sync_steps": 2}, warm_model),
    "sft, mixture of experts": ("sft", lambda: warm_model(tiny.moe_model)),
}
_OF_TIME = re.compile("runtime|per_second|flos|train_loss")


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_the_trainer_of_trl(case):
    config, model = CASES[case]
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    given = {"train_dataset": rows(40), "eval_dataset": rows(6, 5), "qtarget_config": config}
    trainers = [
        plain(model(), sft_config(**options), QTargetSFTTrainer, data_collator=None, **given),
        plain(model(), arguments_of(sft_config(**options)), **given),
    ]
    start = trainable(trainers[0].model)
    for trainer in trainers:
        trainer.train()
    theirs, ours = (trainer.state.log_history for trainer in trainers)
    assert len(ours) == len(theirs) >= 5
    for line, truth in zip(ours, theirs, strict=True):
        assert line.keys() == truth.keys()
        compared = [name for name in truth if not _OF_TIME.search(name)]
        assert [line[name] for name in compared] == pytest.approx([truth[name] for name in compared], rel=SAME)
    assert worst(trainable(trainers[1].model), trainable(trainers[0].model)) < SAME
    assert any(not torch.equal(value, start[name]) for name, value in trainable(trainers[1].model).items())


def test_sft_is_the_loss_of_the_plain_trainer():
    """Its model's own, over two accumulation steps."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    truth = plain(warm_model(), arguments_of(sft_config(**options)), Trainer, train_dataset=rows())
    truth.train()
    for cls in (QTargetTrainer, QTargetStubborn):
        ours = plain(
            warm_model(), arguments_of(sft_config(**options)), cls, train_dataset=rows(), qtarget_config="sft"
        )
        ours.train()
        losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (ours, truth)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert worst(trainable(ours.model), trainable(truth.model)) < 1e-5


def test_logits_and_labels_reach_compute_metrics():
    seen = []
    args = arguments_of(sft_config())
    trainer = plain(
        warm_model(),
        args,
        eval_dataset=rows(6, 5),
        qtarget_config="dft",
        compute_metrics=lambda found: seen.append(found) or {"mine": 1.0},
    )
    with pytest.warns(UserWarning, match="an extra forward pass"):
        metrics = trainer.evaluate()
    assert metrics["eval_mine"] == 1.0 and {"eval_loss", "eval_target/nll"} <= metrics.keys()
    assert seen[0].predictions.shape[:2] == seen[0].label_ids.shape


def test_weights_come_from_the_collator():
    """One that the user writes, which sees the column that the target names."""
    config = {"method": "cft", "token_weight_column": "worth"}
    weighted = rows().map(lambda row: {"worth": [index % 3 / 2 for index in range(len(row["input_ids"]))]})
    pad = DataCollatorForSeq2Seq(tiny.tokenizer())

    def collate(examples):
        columns = [torch.tensor(example.pop("worth"), dtype=torch.float32) for example in examples]
        return {**pad(examples), "token_weights": torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)}

    trainers = [
        make_trainer(QTargetSFTTrainer, weighted, warm_model(), qtarget_config=config),
        plain(
            warm_model(),
            arguments_of(sft_config(max_steps=3)),
            train_dataset=weighted,
            qtarget_config=config,
            data_collator=collate,
        ),
    ]
    for trainer in trainers:
        trainer.train()
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=SAME)


def test_goes_on_from_a_checkpoint_and_names_the_target(tmp_path):
    config = {"method": "asft", "prior": "lagged", "prior_sync_steps": 3}

    def trainer(target=config):
        options = {"output_dir": str(tmp_path), "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
        args = arguments_of(sft_config(**options))
        return plain(warm_model(), args, train_dataset=rows(), qtarget_config=target)

    whole = trainer()
    whole.add_callback(InspectionCallback(whole, rows().select(range(2)), every=5, directory=tmp_path / "pages"))
    whole.train()
    whole.save_model()
    assert [page.name for page in sorted((tmp_path / "pages").iterdir())] == ["step-000000.html", "step-000005.html"]
    with pytest.raises(ValueError, match="is not the target that"):
        trainer("dft").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    halved = trainer()
    halved.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert worst(trainable(halved.model), trainable(whole.model)) < SAME
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert json.loads((folder / "qtarget_config.json").read_text())["method"] == "asft"
    card = (tmp_path / "README.md").read_text()
    assert card.index("### Training target") < card.index("### Framework versions")
    assert "- trl-qtarget" in card.split("---")[1]


# --- refused ---


def test_bases_in_another_order():
    with pytest.raises(TypeError, match=re.escape("write `class Other(QTargetMixin, ...)`")):
        type("Other", (Trainer, QTargetMixin), {})


def refused(message: str, **arguments):
    given = {"model": warm_model(), "args": arguments_of(sft_config()), "qtarget_config": "sft"} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        plain(given.pop("model"), given.pop("args"), **given)


def test_what_needs_trl_or_another_model():
    refused("`model_init` makes another model", model=None, model_init=warm_model)
    refused("`model` must be a loaded causal language model, got `str`", model="a/path")
    refused("`model` must be a loaded causal language model, got `NoneType`", model=None)
    args = arguments_of(sft_config(label_smoothing_factor=0.1))
    refused("`label_smoothing_factor` in the `TrainingArguments` would replace the target", args=args)
    trainer = plain(warm_model(), arguments_of(sft_config()), qtarget_config="sft")
    with pytest.raises(ValueError, match="has no `input_ids`: tokenise it"):
        trainer.prepare_rows(tiny.text_dataset(2), "mine")


def test_several_gpus_of_one_process():
    args = arguments_of(sft_config())
    args.__class__ = type("Two", (TrainingArguments,), {"n_gpu": 2})
    refused("does not train with `nn.DataParallel`", args=args)


def test_head_of_liger():
    args = arguments_of(sft_config())
    args.use_liger_kernel, args.liger_kernel_config = True, {"fused_linear_cross_entropy": True}
    refused("`liger_kernel_config={'fused_linear_cross_entropy': True}`", args=args)
    args.liger_kernel_config = {"rope": False}
    plain(warm_model(), args, qtarget_config="sft")
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


def test_batch_without_labels_or_weights():

    def first_step(config, dataset, collator):
        args = arguments_of(sft_config(max_steps=1))
        plain(warm_model(), args, train_dataset=dataset, qtarget_config=config, data_collator=collator).train()

    collator = DataCollatorForSeq2Seq(tiny.tokenizer())
    with pytest.raises(ValueError, match="`data_collator` gave a batch without `labels`"):
        first_step("sft", rows().remove_columns("labels"), collator)
    with pytest.raises(ValueError, match="`data_collator` gave a batch without `token_weights`"):
        first_step("cft", rows(), collator)


def test_an_evaluation_passes_over_a_batch_once():
    """Logits that nobody asks for would take a second pass."""
    args = arguments_of(sft_config(per_device_eval_batch_size=3))
    trainer, passes = plain(warm_model(), args, eval_dataset=rows(6, 5), qtarget_config="dft"), []
    trainer.model.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.evaluate()
    assert len(passes) == len(trainer.get_eval_dataloader()) == 2
