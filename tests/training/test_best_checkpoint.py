"""Which checkpoint is the best: the one with the lowest NLL, unless another metric is asked for."""

import pytest
import tiny
from training import make_trainer, warm_model
from transformers import EarlyStoppingCallback

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


def trainer_of(directory, method="beyond_log", eval_dataset=None, callbacks=None, cls=QTargetSFTTrainer, **options):
    """Evaluates and saves after each of six steps, of a rate at which the model gets worse after a while."""
    defaults = {
        "output_dir": str(directory),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 4.0,
    }
    return make_trainer(
        cls,
        tiny.text_dataset(),
        warm_model(),
        steps=6,
        qtarget_config=method,
        eval_dataset=tiny.text_dataset(8, seed=5) if eval_dataset is None else eval_dataset,
        callbacks=callbacks,
        options=defaults | options,
    )


def evaluations(trainer, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in trainer.state.log_history if name in line}


@pytest.mark.parametrize("chosen", [None, "target/nll", "eval_target/nll"])
def test_the_best_checkpoint_has_the_lowest_nll(tmp_path, chosen):
    trainer = trainer_of(tmp_path, "psft", metric_for_best_model=chosen)
    trainer.train()
    found = evaluations(trainer, "eval_target/nll")
    best = min(found, key=found.get)
    assert best not in (min(found), max(found)), "neither the first nor the last: something was chosen"
    assert trainer.state.best_metric == found[best]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_target/nll"] == pytest.approx(found[best], rel=1e-6)


def test_the_objectives_own_value_is_there_for_who_asks(tmp_path):
    trainer = trainer_of(tmp_path, "sft", metric_for_best_model="eval_loss")
    trainer.train()
    found = evaluations(trainer, "eval_loss")
    assert trainer.state.best_metric == min(found.values())
    assert trainer.args.metric_for_best_model == "eval_loss" and trainer.args.greater_is_better is False


def test_another_metric_is_left_alone(tmp_path):
    trainer = trainer_of(tmp_path, metric_for_best_model="mean_token_accuracy")
    trainer.train()
    assert trainer.state.best_metric == max(evaluations(trainer, "eval_mean_token_accuracy").values())


def test_stopping_early_judges_by_nll(tmp_path):
    trainer = trainer_of(tmp_path, "psft", callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])
    trainer.train()
    found = list(evaluations(trainer, "eval_target/nll").values())
    assert found.index(min(found)) == len(found) - 2 and len(found) < 6


def test_a_rate_that_waits_for_a_plateau_judges_by_nll(tmp_path):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}}
    trainer = trainer_of(tmp_path, "psft", load_best_model_at_end=False, **options)
    trainer.train()
    found = list(evaluations(trainer, "eval_target/nll").values())
    assert trainer.lr_scheduler.best == min(found)


def test_several_sets_have_metrics_under_their_own_names(tmp_path):
    sets = {"near": tiny.text_dataset(8, seed=5), "far": tiny.text_dataset(8, seed=6)}
    with pytest.raises(ValueError, match="`metric_for_best_model='near_target/nll'`"):
        trainer_of(tmp_path, eval_dataset=sets)
    trainer = trainer_of(tmp_path, eval_dataset=sets, metric_for_best_model="far_target/nll")
    trainer.train()
    far, near = (evaluations(trainer, f"eval_{name}_target/nll") for name in ("far", "near"))
    assert len(far) == len(near) == 6 and far != near
    assert trainer.state.best_metric == min(far.values())
    assert trainer_of(tmp_path, eval_dataset=sets["far"]).evaluate()["eval_target/nll"] != far[1]
    assert trainer.evaluate(sets["far"])["eval_target/nll"] == pytest.approx(min(far.values()), rel=1e-6)


def test_lagged_prior_is_that_of_the_checkpoint_that_was_loaded(tmp_path):
    config = QTargetConfig("psft", prior_sync_steps=1)
    trainer = trainer_of(tmp_path, config)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-6")
    weights = dict(trainer.model.named_parameters())
    # In step with the policy after every step.
    assert all((part == weights[name]).all() for name, part in trainer._prior.parts.items())


def test_a_target_that_needs_no_best_checkpoint_is_left_alone(tmp_path):
    trainer = trainer_of(tmp_path, load_best_model_at_end=False)
    assert trainer.args.metric_for_best_model is None
