"""What a run logs of its target, and how it is evaluated: the numbers are the ones on dense logits."""

import pytest
import tiny
import torch
from training import (
    DENSE_TOLERANCE,
    SAME,
    batches,
    dense_loss,
    first_batch,
    make_trainer,
    other_model,
    train_target,
    warm_model,
)

from trl_qtarget import QTargetSFTTrainer, build_target


# --- what is logged ---


@pytest.mark.parametrize("method", ["sft", "asft", "target_sft"])
def test_train_logs_the_target(method):
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(4), warm_model(), qtarget_config=method, ref_model=other_model(), steps=1
    )
    batch = first_batch(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:].flatten()
    with torch.no_grad():
        logits, prior = (model(**inputs).logits[:, :-1].flatten(0, 1) for model in (warm_model(), other_model()))
    target = build_target(logits, labels, method, prior_logits=prior)
    scored = labels != -100
    log_p = logits.log_softmax(-1)
    chosen = labels.clamp(min=0)[:, None]
    expected = {
        "target/nll": -log_p.gather(1, chosen)[scored].mean(),
        "target/label_mass": target.probs.gather(1, chosen)[scored].mean(),
        "target/kl": (torch.xlogy(target.probs, target.probs) - target.probs * log_p).sum(-1)[scored].mean(),
    }
    trainer.train()
    line = trainer.state.log_history[0]
    for name, value in expected.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-5), name
    assert 0 < line["target/trust"] <= 1
    if method == "sft":
        assert "target/prior_agreement" not in line
    else:
        agreement = (prior.argmax(-1) == labels)[scored].double().mean()
        assert line["target/prior_agreement"] == pytest.approx(agreement.item(), rel=1e-6)
    if method == "sft":
        assert line["target/nll"] == pytest.approx(line["loss"], rel=SAME)
        assert line["target/trust"] == line["target/label_mass"] == 1


def test_train_log_line_is_the_mean_over_tokens_of_its_steps():
    one_by_one = train_target("dft", steps=6, options={"learning_rate": 0.0})
    together = train_target("dft", steps=6, options={"learning_rate": 0.0, "logging_steps": 6})
    dataset = one_by_one.trainer.get_train_dataloader()
    counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in dataset]
    torch.manual_seed(0)
    assert len(together.steps) == 1
    total = sum(counts)
    lines, line = one_by_one.steps, together.steps[0]
    for name in ("target/nll", "target/trust", "target/label_mass", "target/kl"):
        # One epoch of six batches: the order in which a loader gives them does not matter to the mean of all.
        trainer = one_by_one.trainer
        logits = [dense_values(trainer, batch, name) for batch in dataset]
        assert line[name] == pytest.approx(sum(logits) / total, rel=1e-5), name
        assert min(x[name] for x in lines) < line[name] < max(x[name] for x in lines)


def dense_values(trainer, batch, name: str) -> float:
    """The sum over a batch's scored tokens of what a metric is the mean of."""
    labels = batch["labels"][:, 1:].flatten()
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    logits, labels = logits[labels != -100], labels[labels != -100]
    target, log_p = build_target(logits, labels, "dft").probs, logits.log_softmax(-1)
    label_log_p = log_p.gather(1, labels[:, None])
    values = {
        "target/nll": -label_log_p,
        "target/trust": label_log_p.exp(),
        "target/label_mass": target.gather(1, labels[:, None]),
        "target/kl": torch.xlogy(target, target) - target * log_p,
    }
    return values[name].sum().item()


def test_train_gem_logs_no_kl():
    run = train_target("gem", eval_dataset=tiny.text_dataset(8, 3), options={"eval_strategy": "steps"})
    assert not any("target/kl" in name for line in run.trainer.state.log_history for name in line)
    assert {"target/nll", "target/trust", "target/label_mass"} <= run.steps[0].keys()


# --- evaluation ---


def test_train_evaluates_with_the_prior():
    run = train_target("asft", eval_dataset=tiny.text_dataset(4, 3), options={"eval_strategy": "steps"}, steps=3)
    names = {f"eval_target/{name}" for name in ("nll", "trust", "label_mass", "kl")}
    assert all(names <= line.keys() for line in run.evaluations)
    (batch,) = batches(run.trainer, evaluation=True)
    with torch.no_grad():
        truth = dense_loss(run.trainer, batch, prior=warm_model()).item()
    assert run.evaluations[-1]["eval_loss"] == pytest.approx(truth, rel=DENSE_TOLERANCE)
    assert run.trainer.evaluate()["eval_loss"] == run.evaluations[-1]["eval_loss"]


def test_train_several_evaluation_sets():
    sets = {"short": tiny.text_dataset(4, 3), "long": tiny.text_dataset(8, 4)}
    run = train_target("asft", eval_dataset=sets, options={"eval_strategy": "steps", "eval_steps": 2}, steps=2)
    for name in sets:
        (line,) = [line for line in run.trainer.state.log_history if f"eval_{name}_loss" in line]
        assert line[f"eval_{name}_target/nll"] > line[f"eval_{name}_loss"] > 0 and "eval_target/nll" not in line


@pytest.mark.filterwarnings("ignore:The logits that `compute_metrics` receives:UserWarning")
def test_train_compute_metrics_gets_logits():
    seen = []

    def accuracy(prediction):
        seen.append(prediction.predictions)
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"own_accuracy": hits[prediction.label_ids[:, 1:] != -100].mean()}

    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model(),
        qtarget_config="asft",
        eval_dataset=tiny.text_dataset(4, 3),
        compute_metrics=accuracy,
    )
    result = trainer.evaluate()
    (batch,) = batches(trainer, evaluation=True)
    logits = warm_model()(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(seen[0]), logits.detach(), rtol=0, atol=1e-5)
    assert result["eval_own_accuracy"] == pytest.approx(result["eval_mean_token_accuracy"], abs=1e-6)
