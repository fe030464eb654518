"""Per-token weights stay with their tokens, from the dataset to the loss, in every way that TRL prepares data."""

import random
from itertools import product

import pytest
import tiny
import torch
from datasets import Dataset
from thinned import thinned
from training import (
    SAME,
    batches,
    check_equals_dense,
    first_batch,
    loss_and_gradients,
    make_trainer,
    train,
    train_target,
    warm_model,
    worst,
)
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


CFT = QTargetConfig("cft")


def weight_of(token):
    """The weight that belongs to a token, wherever it ends up: a function of its id."""
    return token % 7 / 4


def rows(count: int = 40, longest: int = 30, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 320) for _ in range(rng.randint(2, longest))] for _ in range(count)]


def dataset(column: str = "token_weights", mask: bool = False, **options) -> Dataset:
    data = rows(**options)
    columns = {"input_ids": data, column: [[weight_of(token) for token in row] for row in data]}
    if mask:
        columns["completion_mask"] = [[int(index >= 2) for index in range(len(row))] for row in data]
    # A column that is no list per token must not disturb anything.
    return Dataset.from_dict(columns | {"note": ["x"] * len(data)})


def cft_trainer(data, config=CFT, **arguments) -> QTargetSFTTrainer:
    return make_trainer(QTargetSFTTrainer, data, warm_model(), qtarget_config=config, **arguments)


PREPARATIONS = {
    "plain": {"max_length": None},
    "keep_start": {"max_length": 12},
    "keep_end": {"max_length": 12, "truncation_mode": "keep_end"},
    "bfd": {"packing": True, "max_length": 20},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 20},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 20},
    "padding_free": {"padding_free": True, "max_length": None},
    "pad_to_multiple": {"max_length": 12, "pad_to_multiple_of": 8},
    "padding_free_multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
}


def all_batches(trainer) -> list[dict]:
    torch.manual_seed(3)  # of the sampler
    return batches(trainer)


_PREPARED = list(product(PREPARATIONS, [False, True], [False, True], [False, True]))


@pytest.mark.parametrize(
    ("name", "streaming", "shuffle", "mask"), thinned(_PREPARED, lambda name, *flags: sum(flags) in (0, 2))
)
def test_batches_are_those_of_trl_with_weights(name, streaming, shuffle, mask):
    options = PREPARATIONS[name] | {"shuffle_dataset": shuffle, "completion_only_loss": mask}
    data = dataset(mask=mask)
    data = data.to_iterable_dataset() if streaming else data
    ours = all_batches(cft_trainer(data, options=options))
    theirs = all_batches(make_trainer(SFTTrainer, data, warm_model(), options=options))

    assert len(ours) == len(theirs) > 1
    for batch, expected in zip(ours, theirs, strict=True):
        weights, ids = batch.pop("token_weights"), batch["input_ids"]
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(value)), key
        assert weights.shape == ids.shape and weights.dtype == torch.float32
        real = ids >= 4  # the padding token is 0
        assert torch.equal(weights, torch.where(real, weight_of(ids), 0.0))
        assert real.sum() > 4


def test_evaluation_set_is_prepared_alike():
    options = PREPARATIONS["keep_end"] | {"packing": True, "packing_strategy": "wrapped", "eval_packing": False}
    trainer = cft_trainer(dataset(), eval_dataset=dataset(count=6, seed=1), options=options)
    for batch in [*batches(trainer), *batches(trainer, evaluation=True)]:
        assert torch.equal(
            batch["token_weights"], torch.where(batch["input_ids"] >= 4, weight_of(batch["input_ids"]), 0)
        )
    once = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(dataset(count=6, seed=1))["eval_loss"] == pytest.approx(once, rel=SAME)


def test_column_of_another_name():
    config = QTargetConfig("cft", token_weight_column="criticality")
    batch = first_batch(cft_trainer(dataset("criticality"), config))
    assert torch.equal(batch["token_weights"], torch.where(batch["input_ids"] >= 4, weight_of(batch["input_ids"]), 0))
    assert "criticality" not in batch


def test_text_is_tokenized_and_weights_count_its_tokens():
    texts = tiny.sentences(8)
    lengths = [len(ids) for ids in tiny.tokenizer()([text + "<eos>" for text in texts])["input_ids"]]
    data = Dataset.from_dict({"text": texts, "token_weights": [[1.0] * length for length in lengths]})
    trainer = cft_trainer(data)
    check_equals_dense(trainer)
    assert first_batch(trainer)["token_weights"].max() == 1


def test_extra_columns_may_stay():
    assert train_target(CFT, dataset().remove_columns("note"), options={"remove_unused_columns": False}).moved()


# --- the weights reach the loss ---


@pytest.mark.parametrize("name", ["plain", "keep_start", "keep_end", "wrapped"])
def test_loss_is_that_of_the_weights(name):
    check_equals_dense(cft_trainer(dataset(), options=PREPARATIONS[name]))


def test_constant_weights_scale_the_gradient():
    """Weights of 2.5 and a learning rate 2.5 times smaller give the steps of `sft`, without clipping."""
    options = {"max_grad_norm": 0.0, "learning_rate": 0.1}
    data = dataset().map(lambda row: {"token_weights": [2.5] * len(row["input_ids"])})
    weighted = train_target(CFT, data, steps=4, options=options | {"learning_rate": 0.04})
    plain = train_target("sft", data, steps=4, options=options)
    assert [loss / 2.5 for loss in weighted.column("loss")] == pytest.approx(plain.column("loss"), rel=1e-5)
    assert weighted.column("target/nll") == pytest.approx(plain.column("loss"), rel=1e-5)
    assert worst(weighted.weights, plain.weights) < 1e-5


def test_zero_weight_is_an_ignored_label_that_still_counts():
    data = dataset(count=4).map(lambda row: {"token_weights": [float(token % 3 > 0) for token in row["input_ids"]]})
    weighted = cft_trainer(data)
    batch = first_batch(weighted)
    loss, gradients = loss_and_gradients(weighted, batch)

    masked = make_trainer(SFTTrainer, data.remove_columns("token_weights"), warm_model())
    labels = batch["labels"].masked_fill(batch["token_weights"] == 0, -100)
    counted, all_tokens = ((values[:, 1:] != -100).sum().item() for values in (labels, batch["labels"]))
    assert 0 < counted < all_tokens
    mask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    truth, expected = loss_and_gradients(masked, mask)
    assert loss == pytest.approx(truth * counted / all_tokens, rel=1e-5)
    assert worst(gradients, {name: value * counted / all_tokens for name, value in expected.items()}) < 1e-5


@pytest.mark.parametrize("name", ["bfd", "bfd_split", "padding_free", "wrapped", "keep_end"])
def test_train_with_weights(name):
    assert train_target(CFT, dataset(), options=PREPARATIONS[name]).moved()


def test_free_combination_with_weights():
    config = QTargetConfig(method=None, trust="token_weights", residual="uniform", token_weight_column="w")
    check_equals_dense(cft_trainer(dataset("w"), config))


# --- what is refused ---


def test_missing_column():
    message = r"`token_weight_column='token_weights'` is missing from the train dataset, whose columns are \['text'\]"
    with pytest.raises(ValueError, match=message):
        cft_trainer(tiny.text_dataset())
    with pytest.raises(ValueError, match=r"`token_weight_column='w'` is missing from the train dataset"):
        cft_trainer(dataset(), QTargetConfig("cft", token_weight_column="w"))
    with pytest.raises(ValueError, match="missing from the train dataset"):
        cft_trainer(tiny.text_dataset().to_iterable_dataset())


def test_missing_column_of_an_evaluation_set():
    bare = dataset().remove_columns("token_weights")
    with pytest.raises(ValueError, match="missing from the eval dataset"):
        cft_trainer(dataset(), eval_dataset=bare)
    with pytest.raises(ValueError, match="missing from the second dataset"):
        cft_trainer(dataset(), eval_dataset={"first": dataset(), "second": bare})


def test_missing_column_of_a_later_evaluation_set():
    with pytest.raises(ValueError, match="missing from the eval dataset"):
        cft_trainer(dataset()).evaluate(dataset().remove_columns("token_weights"))


def with_row(row: int, weights) -> Dataset:
    data = dataset().to_dict()
    data["token_weights"][row] = weights(data["token_weights"][row])
    return Dataset.from_dict(data)


BAD = {
    "negative": (lambda row: [-0.1, *row[1:]], "`token_weights` of example 5 has a weight that is negative, NaN or"),
    "nan": (lambda row: [*row[:-1], float("nan")], "`token_weights` of example 5 has a weight that is negative, NaN"),
    "infinite": (lambda row: [float("inf"), *row[1:]], "`token_weights` of example 5 has a weight that is negative"),
    "null": (lambda row: [None, *row[1:]], "`token_weights` of example 5 has a weight that is negative, NaN or"),
    "too_long": (lambda row: [*row, 1.0], r"`token_weights` of example 5 has \d+ weights for \d+ tokens"),
    "too_short": (lambda row: row[:-1], r"`token_weights` of example 5 has \d+ weights for \d+ tokens"),
    "none": (lambda row: None, r"`token_weights` of example 5 has 0 weights for \d+ tokens"),
}


@pytest.mark.parametrize("options", ["keep_start", "bfd"])
@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_before_training(name, options):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        cft_trainer(with_row(5, change), options=PREPARATIONS[options])


def test_bad_weights_of_a_stream_are_refused():
    change, message = BAD["negative"]
    with pytest.raises(ValueError, match=message):
        batches(cft_trainer(with_row(5, change).to_iterable_dataset()))


def test_text_whose_weights_forget_the_end_token():
    texts = tiny.sentences(4)
    lengths = [len(ids) for ids in tiny.tokenizer()(texts)["input_ids"]]
    data = Dataset.from_dict({"text": texts, "token_weights": [[1.0] * length for length in lengths]})
    with pytest.raises(ValueError, match=f"has {lengths[0]} weights for {lengths[0] + 1} tokens: give one weight per"):
        cft_trainer(data)


# --- data that skips preparation, and other collators ---


SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def test_skipped_preparation():
    trainer = cft_trainer(dataset(), options=SKIP)
    check_equals_dense(trainer)
    prepared = train(QTargetSFTTrainer, dataset(), warm_model(), qtarget_config=CFT)
    skipped = train(QTargetSFTTrainer, dataset(), warm_model(), qtarget_config=CFT, options=SKIP)
    assert worst(skipped.weights, prepared.weights) < SAME


@pytest.mark.parametrize(
    ("name", "message"),
    [("negative", "has a weight that is negative, NaN or infinite"), ("too_short", r"has \d+ entries for \d+ tokens")],
)
def test_skipped_preparation_is_checked_by_the_collator(name, message):
    with pytest.raises(ValueError, match=message):
        batches(cft_trainer(with_row(5, BAD[name][0]), options=SKIP))


class PlainCollator:
    """A collator of the user's own, which may know nothing of weights."""

    def __init__(self, with_weights: bool):
        self.with_weights = with_weights

    def __call__(self, examples):
        length = min(len(example["input_ids"]) for example in examples)
        ids = torch.tensor([example["input_ids"][:length] for example in examples])
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        return batch | ({"token_weights": weight_of(ids)} if self.with_weights else {})


def test_custom_collator_without_weights_is_refused():
    message = "`data_collator` gave a batch without `token_weights`, which `method='cft'` needs"
    trainer = cft_trainer(dataset(), data_collator=PlainCollator(False))
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_custom_collator_with_weights():
    trainer = cft_trainer(dataset(), data_collator=PlainCollator(True))
    check_equals_dense(trainer)
    trainer.train()


class HidingCollator(DataCollatorForLanguageModeling):
    """The user's own rules on top of TRL's collator."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["labels"][:, :3] = -100
        return batch | {"token_weights": weight_of(batch["input_ids"])}


def test_custom_collator_derived_from_that_of_trl_is_left_alone():
    trainer = cft_trainer(dataset(), data_collator=HidingCollator(pad_token_id=0))
    batch = first_batch(trainer)
    assert (batch["labels"][:, :3] == -100).all() and (batch["labels"][:, 3] != -100).any()
    check_equals_dense(trainer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[:, :-1], r"`data_collator` gave `token_weights` of shape \[4, \d+\] for `labels`"),
        (lambda weights: torch.cat([weights, weights], 1), "return one entry per label"),
        (lambda weights: weights[:1], r"`data_collator` gave `token_weights` of shape \[1, \d+\]"),
        (lambda weights: -weights - 1, "with a weight that is negative, NaN or infinite"),
        (lambda weights: weights * torch.nan, "with a weight that is negative, NaN or infinite"),
    ],
    ids=["short", "long", "one_row", "negative", "nan"],
)
def test_weights_of_a_custom_collator_are_checked(change, message):
    class Wrong(PlainCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            return batch | {"token_weights": change(batch["token_weights"])}

    with pytest.raises(ValueError, match=message):
        cft_trainer(dataset(), data_collator=Wrong(True)).train()


@pytest.mark.parametrize("values", [[1.0] * 24, ["high"] * 24, [["high"]] * 24], ids=["scalars", "text", "texts"])
def test_weights_that_are_no_list_of_numbers(values):
    data = tiny.text_dataset(24).add_column("token_weights", values)
    with pytest.raises(ValueError, match="`token_weights` of example 0 is not a list of numbers"):
        cft_trainer(data)
