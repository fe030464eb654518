"""`iw_sft` weighs documents, and a document stays one whatever row of whatever batch its tokens lie in."""

import random

import pytest
import torch
from datasets import Dataset
from training import (
    DENSE_TOLERANCE,
    batches,
    check_equals_dense,
    first_batch,
    loss_and_gradients,
    make_trainer,
    train_target,
    warm_model,
    worst,
)

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


DOCUMENTS = 8


def document_of(token):
    """Every document has ten tokens of its own."""
    return (token - 4) // 10


def dataset(count: int = DOCUMENTS, shortest: int = 3, longest: int = 14) -> Dataset:
    rng = random.Random(0)
    return Dataset.from_dict(
        {
            "input_ids": [
                [4 + 10 * number + rng.randrange(10) for _ in range(rng.randint(shortest, longest))]
                for number in range(count)
            ]
        }
    )


def trainer_of(method="iw_sft", data=None, **options) -> QTargetSFTTrainer:
    """A trainer whose reference model has learned something else, with one batch for all documents."""
    return make_trainer(
        QTargetSFTTrainer,
        dataset() if data is None else data,
        warm_model(),
        qtarget_config=method,
        ref_model=warm_model(steps=12),
        options={"per_device_train_batch_size": DOCUMENTS, "per_device_eval_batch_size": DOCUMENTS} | options,
    )


@torch.no_grad()
def scored_tokens(trainer, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Label, trust and log-ratio of policy and reference for every scored token of a batch."""
    batch = dict(batch)
    request = trainer.target_request(batch)
    tokens = trainer.model(**batch, qtarget=request).tokens
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    labels = batch["labels"][:, 1:]
    ratio = 0
    for model, sign in ((warm_model(), 1), (warm_model(steps=12), -1)):
        log_p = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        ratio = ratio + sign * log_p.gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
    trust = tokens.trust.view_as(batch["labels"])[:, :-1]
    scored = labels != -100
    return labels[scored], trust[scored], ratio[scored]


def trust_by_document(trainer, batch) -> dict[int, float]:
    """The trust of each document in a batch, after checking that all its tokens have the same."""
    labels, trust, ratio = scored_tokens(trainer, batch)
    found = {}
    for document in document_of(labels).unique().tolist():
        own = document_of(labels) == document
        assert trust[own].unique().numel() == 1
        found[document] = trust[own][0].item()
        by_hand = ratio[own].mean().exp().clamp(max=16.0).item()
        assert found[document] == pytest.approx(by_hand, rel=1e-5)
    return found


ONE_ROW = {
    "bfd": {"packing": True, "max_length": 120},
    "bfd_rows": {"packing": True, "max_length": 30},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 120},
    "padding_free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_documents_weigh_the_same_packed_and_padded(name):
    padded, packed = trainer_of(), trainer_of(**ONE_ROW[name])
    rows, batch = first_batch(padded), first_batch(packed)
    assert len(batch["input_ids"]) == 1
    truth = trust_by_document(padded, rows)
    assert len(truth) == DOCUMENTS and max(truth.values()) > 1.1 * min(truth.values())
    assert trust_by_document(packed, batch) == pytest.approx(truth, rel=1e-5)

    loss, gradients = loss_and_gradients(packed, batch)
    expected_loss, expected = loss_and_gradients(padded, rows)
    assert loss == pytest.approx(expected_loss, rel=DENSE_TOLERANCE)
    assert worst(gradients, expected) < DENSE_TOLERANCE


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["", "shuffled"])
@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_documents_that_packing_cuts_stay_one(strategy, shuffle, streaming):
    data = dataset()
    trainer = trainer_of(
        data=data.to_iterable_dataset() if streaming else data,
        packing=True,
        packing_strategy=strategy,
        max_length=9,
        shuffle_dataset=shuffle,
        per_device_train_batch_size=2 * DOCUMENTS,
    )
    (batch,) = batches(trainer)
    assert torch.equal(batch["input_ids"] >= 4, batch["labels"].ne(-100) | (batch["input_ids"] >= 4))
    assert len(trust_by_document(trainer, batch)) == DOCUMENTS


@pytest.mark.parametrize("method", ["iw_sft", QTargetConfig(method=None, trust="importance", residual="uniform")])
def test_padded_rows_are_documents(method):
    check_equals_dense(trainer_of(method), warm_model(steps=12))


def evaluating_trainer(rows: int, options: dict):
    """A trainer whose evaluation set is one batch of `rows`."""
    return make_trainer(
        QTargetSFTTrainer,
        dataset(),
        warm_model(),
        qtarget_config="iw_sft",
        ref_model=warm_model(steps=12),
        eval_dataset=dataset(),
        options={"per_device_eval_batch_size": rows} | options,
    )


def test_packed_training_has_padded_evaluation():
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 20, "eval_packing": False}
    trainer = evaluating_trainer(DOCUMENTS, options)
    (packed,) = batches(trainer, evaluation=True)
    assert "sequence_ids" not in packed
    truth = trainer_of(max_length=20)
    assert trust_by_document(trainer, packed) == pytest.approx(trust_by_document(truth, first_batch(truth)), rel=1e-6)


def test_padded_training_has_packed_evaluation():
    options = {"max_length": 9, "eval_packing": True, "packing_strategy": "wrapped"}
    trainer = evaluating_trainer(2 * DOCUMENTS, options)
    (batch,) = batches(trainer, evaluation=True)
    assert len(trust_by_document(trainer, batch)) == DOCUMENTS


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_train_under_packing(strategy):
    options = {"packing": True, "packing_strategy": strategy, "max_length": 24}
    assert train_target("iw_sft", options=options, steps=4).moved()


def test_other_methods_need_no_document_column():
    batch = first_batch(trainer_of("asft", packing=True, packing_strategy="wrapped", max_length=20))
    assert "sequence_ids" not in batch
