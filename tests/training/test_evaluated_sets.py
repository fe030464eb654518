"""`evaluate` of anything: a dict, a set that is prepared already, a part of one. Nothing is packed twice."""

import pytest
import tiny
from datasets import Dataset
from test_documents import dataset
from training import SAME, make_trainer, other_model, warm_model

from trl_qtarget import QTargetSFTTrainer


PACKING = {
    "padded": {"max_length": 24},
    "bfd": {"packing": True, "max_length": 24},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "shuffled": {"packing": True, "packing_strategy": "wrapped", "max_length": 24, "shuffle_dataset": True},
    "evaluation_only": {"eval_packing": True, "max_length": 24},
}
NAMES = ("loss", "target/nll", "target/trust", "target/label_mass")


def trainer_of(eval_dataset, method: str = "iw_sft", cls: type = QTargetSFTTrainer, **options) -> QTargetSFTTrainer:
    return make_trainer(
        cls,
        dataset(6, 3, 9),
        warm_model(),
        qtarget_config=method,
        ref_model=other_model() if method == "iw_sft" else None,
        eval_dataset=eval_dataset,
        options=options,
    )


def numbers(found: dict[str, float]) -> dict[str, float]:
    return {name: found[f"eval_{name}"] for name in NAMES}


@pytest.mark.parametrize("method", ["sft", "iw_sft"])
@pytest.mark.parametrize("name", PACKING)
def test_prepared_set_is_left_as_it_is(name, method):
    trainer = trainer_of(dataset(), method, **PACKING[name])
    truth = numbers(trainer.evaluate())
    assert numbers(trainer.evaluate(trainer.eval_dataset)) == pytest.approx(truth, rel=SAME)
    assert numbers(trainer.evaluate(dataset())) == pytest.approx(truth, rel=SAME)  # and one that is not


@pytest.mark.parametrize("prepared", [False, True], ids=["raw", "prepared"])
@pytest.mark.parametrize("name", PACKING)
def test_each_set_of_a_dict_is_evaluated_as_by_itself(name, prepared):
    sets = {"few": dataset(3, 3, 9), "many": dataset(8, 3, 9)}
    trainer = trainer_of(sets, **PACKING[name])
    found = trainer.evaluate(trainer.eval_dataset if prepared else sets)
    for key, each in sets.items():
        alone = trainer_of(each, **PACKING[name]).evaluate()
        assert found[f"eval_{key}_loss"] == pytest.approx(alone["eval_loss"], rel=SAME)


class Seeing(QTargetSFTTrainer):
    """Remembers what was evaluated."""

    seen = ()

    def get_eval_dataloader(self, eval_dataset=None):
        self.seen += (eval_dataset,)
        return super().get_eval_dataloader(eval_dataset)


def test_part_of_a_packed_set_is_not_packed_again():
    trainer = trainer_of(dataset(), cls=Seeing, **PACKING["wrapped"])
    part = trainer.eval_dataset.select([0, 2])
    trainer.evaluate(part)
    assert trainer.seen == (part,)


def test_set_that_is_trained_on_unpacked_is_packed_for_evaluation():
    """What one of the two leaves as it is, the other does not."""
    rows = tiny.tokenizer()(tiny.sentences(8, seed=1))["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    options = {"eval_packing": True, "packing_strategy": "wrapped", "max_length": 24}
    trainer = make_trainer(
        QTargetSFTTrainer, data, warm_model(), qtarget_config="sft", eval_dataset=data, options=options
    )
    assert len(trainer.train_dataset) == 8
    assert {len(row) for row in trainer.eval_dataset["input_ids"][:-1]} == {24}
