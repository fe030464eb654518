"""`alpha="auto"`: an exponent that is measured once, of what the policy knows of its data before it is trained."""

import logging
import math

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import make_trainer, other_model, train, warm_model, worst

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.training import knowledge


def quartile_of(model, texts: list[str], virtual: int = 0) -> float:
    """The lower quartile of the mean NLL per sequence, one sequence at a time, from the model's own logits."""
    model.eval()
    means: list[Tensor] = []
    for text in texts:
        tokens = torch.tensor([tiny.tokenizer()(text + "<eos>")["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0].double()
        labels = tokens[0] if virtual else tokens[0, 1:]
        means.append(cross_entropy(logits[max(0, virtual - 1) : -1], labels))
    return torch.quantile(torch.stack(means), 0.25).item()


def measured(trainer: QTargetSFTTrainer) -> float:
    return trainer.settled(QTargetConfig("adaptive_sft")).alpha


def exponent(quartile: float) -> pytest.approx:
    return pytest.approx(math.exp(-3 * quartile), rel=2e-5)


@pytest.fixture(scope="module")
def known() -> tuple:
    """A model, texts of which it knows some, and their quartile."""
    model, texts = warm_model(steps=60), tiny.sentences(18, seed=7) + ["qzx jvk wqy"] * 6
    return model, texts, quartile_of(model, texts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_eval_batch_size": 1},
        {"packing": True, "max_length": 256, "padding_free": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=["padded", "one by one", "packed", "padding-free"],
)
@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_the_exponent_is_of_the_sequences_however_they_are_batched(known, options, monkeypatch):
    model, texts, quartile = known
    if options.get("padding_free"):
        # Eager attention would let documents see each other; each position's own row is what is looked at here.
        model = warm_model(lambda: tiny.model(attn_implementation="sdpa"), steps=60)
        quartile = quartile_of(model, texts)
    trainer = make_trainer(
        QTargetSFTTrainer,
        Dataset.from_dict({"text": texts}),
        model,
        qtarget_config="adaptive_sft",
        options=options,
    )
    assert measured(trainer) == exponent(quartile)


def test_of_a_stream_the_first_rows_are_measured(known, monkeypatch):
    model, texts, _ = known
    monkeypatch.setattr(knowledge, "SAMPLE", 10)
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    trainer = make_trainer(QTargetSFTTrainer, stream, model, qtarget_config="adaptive_sft")
    assert measured(trainer) == exponent(quartile_of(model, texts[:10]))


def test_a_sample_comes_from_all_over_the_data(monkeypatch):
    monkeypatch.setattr(knowledge, "SAMPLE", 4)
    rows = knowledge.sampled_rows(Dataset.from_dict({"number": range(10)}))
    assert [row["number"] for row in rows] == [0, 2, 5, 7]


def test_only_labels_count(known):
    model, _, _ = known
    pairs = tiny.prompt_dataset(8)
    trainer = make_trainer(QTargetSFTTrainer, pairs, model, qtarget_config="adaptive_sft")
    means = []
    for row in trainer.train_dataset:
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        assert 0 < (labels != -100).sum() < len(labels)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1].double()
        means.append(cross_entropy(logits, labels[1:]))
    assert measured(trainer) == exponent(torch.quantile(torch.stack(means), 0.25).item())


def test_virtual_tokens_predict_the_first_token(known):
    model, texts, _ = known
    prompts = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    dataset = Dataset.from_dict({"text": texts})
    trainer = make_trainer(QTargetSFTTrainer, dataset, model, qtarget_config="adaptive_sft", peft_config=prompts)
    assert measured(trainer) == exponent(quartile_of(trainer.model, texts, virtual=3))


def test_training_is_that_with_the_measured_number(known, tmp_path, caplog):
    _, texts, quartile = known
    data = {"text": texts}
    alpha = math.exp(-3 * quartile)
    caplog.set_level(logging.INFO, "trl_qtarget")
    runs = [
        train(
            QTargetSFTTrainer,
            Dataset.from_dict(data),
            warm_model(steps=60),
            qtarget_config=QTargetConfig("adaptive_sft", alpha=value),
            ref_model=other_model(),
            options={"output_dir": str(tmp_path / str(value))},
        )
        for value in ("auto", alpha)
    ]
    assert runs[0].column("loss") == pytest.approx(runs[1].column("loss"), rel=1e-5)
    assert worst(runs[0].weights, runs[1].weights) < 1e-5
    assert f"`alpha` is {alpha:.4g}" in caplog.text and "24 sequences" in caplog.text
    # What is saved says what was trained toward, also to who reads it without the data.
    runs[0].trainer.save_model()
    saved = QTargetConfig.from_pretrained(tmp_path / "auto")
    assert saved.alpha == pytest.approx(alpha, rel=1e-5) and not saved.open_knobs
    assert f'"alpha": {saved.alpha}' in (tmp_path / "auto" / "README.md").read_text()


def test_an_evaluation_before_the_training_measures_it_too(known):
    model, texts, quartile = known
    dataset = Dataset.from_dict({"text": texts})
    trainer = make_trainer(
        QTargetSFTTrainer, dataset, model, qtarget_config="adaptive_sft", eval_dataset=dataset.select(range(4))
    )
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.qtarget_config.alpha == exponent(quartile)


def test_a_resumed_run_keeps_the_exponent_it_began_with(tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    arguments = {"qtarget_config": "adaptive_sft", "peft_config": LoraConfig(r=2, target_modules="all-linear")}
    whole = train(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), steps=4, options=options, **arguments)
    again = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), steps=4, options=options, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.qtarget_config == whole.trainer.qtarget_config and not again.qtarget_config.open_knobs
    assert again._knowledge is None, "nothing is measured with a policy that has learned"
    other = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model(),
        steps=4,
        options=options,
        **arguments | {"qtarget_config": QTargetConfig("adaptive_sft", alpha=0.9)},
    )
    with pytest.raises(ValueError, match="they differ in alpha"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_nothing_to_measure_is_said(known):
    model, texts, _ = known
    trainer = make_trainer(QTargetSFTTrainer, Dataset.from_dict({"text": texts}), model, qtarget_config="adaptive_sft")
    collate = trainer.data_collator

    def without_labels(rows: list[dict]) -> dict:
        batch = collate(rows)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    trainer.data_collator = without_labels
    with pytest.raises(ValueError, match=r"`alpha='auto'`.*no row that was looked at has a labelled token"):
        trainer.train()


def test_a_policy_of_nan_is_refused(known):
    model, texts = warm_model(), known[1]
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    trainer = make_trainer(QTargetSFTTrainer, Dataset.from_dict({"text": texts}), model, qtarget_config="adaptive_sft")
    with pytest.raises(ValueError, match="gives NaN"):
        trainer.settled(trainer.qtarget_config)
