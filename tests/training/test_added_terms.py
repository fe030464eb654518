"""What PEFT adds to the model's loss: a term of one micro-batch, for training only."""

import peft
import pytest
import tiny
from peft import AdaLoraConfig, CPTConfig
from test_normalisation import BATCH, ONE_BY_ONE, TOLERANCE, uneven
from training import SAME, make_trainer, train_target, trainable, warm_model, worst

from trl_qtarget import QTargetSFTTrainer


def adalora(weight: float = 0.5) -> AdaLoraConfig:
    """Its regulariser keeps the adapters' directions at right angles to each other."""
    options = {"init_r": 4, "target_modules": ["q_proj", "down_proj"], "orth_reg_weight": weight, "total_step": 9}
    return AdaLoraConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("method", ["sft", "asft"])
def test_accumulation_does_not_multiply_it(method):
    options = {"max_grad_norm": 0.0}
    one, other = (
        train_target(method, uneven(), peft_config=adalora(), steps=2, options=options | layout)
        for layout in (BATCH, ONE_BY_ONE)
    )
    assert other.column("loss") == pytest.approx(one.column("loss"), rel=TOLERANCE)
    assert worst(other.weights, one.weights) < TOLERANCE
    # It is in the loss and in the gradient: with all of `lora_E` zero, nothing else moves the directions.
    plain = train_target(method, uneven(), peft_config=adalora(0.0), steps=2, options=options | BATCH)
    assert one.column("loss")[0] > plain.column("loss")[0] + 0.1
    assert one.moved()


ADDING = {"adalora": adalora()}
if hasattr(peft, "ShadowConfig"):
    ADDING["shadow"] = peft.ShadowConfig(task_type="CAUSAL_LM")


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ADDING)
def test_evaluation_leaves_it_out(name, accumulation):
    trainer = make_trainer(
        QTargetSFTTrainer,
        uneven(),
        warm_model(),
        qtarget_config="sft",
        peft_config=ADDING[name],
        eval_dataset=uneven(),
        options={"gradient_accumulation_steps": accumulation},
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(found["eval_target/nll"], rel=SAME)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_nothing_added_changes_nothing(steps):
    """The gradient of a micro-batch is bit for bit what it is without a term to look for."""
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="dft")
    batch = next(iter(trainer.get_train_dataloader()))
    count = trainer._get_num_items_in_batch([batch] * steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = steps
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
    found = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    request = trainer.target_request(batch)
    trainer.model(**batch, qtarget=request, num_items_in_batch=count).tokens.loss.backward()
    assert found.keys() == trainable(trainer.model).keys()
    assert all(found[name].equal(value.grad) for name, value in trainer.model.named_parameters())


def test_method_with_a_loss_of_its_own_is_refused():
    tokens = {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}
    with pytest.raises(ValueError, match="`peft_config` is of CPT, which computes a loss of its own"):
        make_trainer(
            QTargetSFTTrainer,
            tiny.text_dataset(),
            warm_model(),
            qtarget_config="sft",
            peft_config=CPTConfig(task_type="CAUSAL_LM", **tokens),
        )
