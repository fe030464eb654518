"""`compute_loss` leaves the batch that it is given as it was: a second call gives the same number."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from training import first_batch, make_trainer, other_model, warm_model

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


def weighted():
    rows = tiny.tokenizer()(tiny.sentences(24, seed=1))["input_ids"]
    weights = [[float(position % 3) for position in range(len(row))] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "token_weights": weights})


CASES = {
    "sft": {},
    "prior": {"qtarget_config": QTargetConfig("asft", prior="base")},
    "documents": {
        "qtarget_config": "iw_sft",
        "ref_model": other_model,
        "options": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    },
    "weights": {"qtarget_config": "cft", "dataset": weighted},
    "experts": {"model": lambda: warm_model(tiny.moe_model)},
}


@pytest.mark.parametrize("outputs", [False, True], ids=["", "outputs"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The logits that `compute_metrics` receives:UserWarning")
def test_batch_is_left_alone(name, outputs):
    given = {key: value() if callable(value) else value for key, value in CASES[name].items()}
    dataset, model = given.pop("dataset", tiny.text_dataset()), given.pop("model", warm_model())
    trainer = make_trainer(QTargetSFTTrainer, dataset, model, **{"qtarget_config": "sft"} | given)
    batch = first_batch(trainer)
    before = copy.deepcopy(dict(batch))
    trainer.model.eval()
    losses = []
    for _ in range(2):
        found = trainer.compute_loss(trainer.model, batch, return_outputs=outputs)
        losses.append((found[0] if outputs else found).item())
        assert batch.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value
    assert losses[0] == losses[1]
