"""What a run says of its target is the target that it trained toward: card, configuration, log, trackers, page."""

import json

import pytest
import tiny
import torch
from measured import CLOSED
from peft import LoraConfig
from training import make_trainer

from trl_qtarget import (
    METHODS,
    PolicyFacts,
    QTargetConfig,
    QTargetSFTTrainer,
    __version__,
    choose_prior,
    inspect_target,
)
from trl_qtarget.priors.resolved import ResolvedTarget


ADAPTED = PolicyFacts({"default": LoraConfig()})


def resolve(config: QTargetConfig, policy: PolicyFacts | None = None, reference=None) -> ResolvedTarget:
    return ResolvedTarget.of(config, choose_prior(config, policy or PolicyFacts(), reference))


FREE = {"method": None, "trust": "entropy", "top_k": 7}


@pytest.mark.parametrize(
    ("config", "policy", "reference", "found"),
    [
        (QTargetConfig(), None, None, QTargetConfig("dft")),
        (QTargetConfig(prior="policy", chunk_tokens=8), None, None, QTargetConfig("dft", chunk_tokens=8)),
        (QTargetConfig(eta=0.0), None, "hub/teacher", QTargetConfig("dft")),
        (QTargetConfig(eta=0.0, prior="lagged"), None, None, QTargetConfig("dft")),
        (QTargetConfig(), ADAPTED, None, QTargetConfig(eta=0.5, prior="base")),
        (QTargetConfig(), ADAPTED, "hub/teacher", QTargetConfig(eta=0.5, prior="model")),
        (QTargetConfig("asft"), None, None, QTargetConfig("asft", lam=0.05, prior="base")),
        (QTargetConfig("psft"), None, None, QTargetConfig("psft", epsilon=0.28, prior="lagged", prior_sync_steps=8)),
        (QTargetConfig("gem", beta=0.9), None, None, QTargetConfig("gem", beta=0.9)),
        (
            QTargetConfig(**FREE, residual="guided", eta=0.3),
            None,
            None,
            QTargetConfig(**FREE, residual="policy", alpha=1.0),
        ),
        (
            QTargetConfig(**FREE, residual="guided", prior="start"),
            None,
            None,
            QTargetConfig(**FREE, residual="guided", alpha=1.0, eta=0.5, prior="start"),
        ),
        # The trust still reads the prior, which is the policy.
        (
            QTargetConfig(None, trust="p * (1 - r)", residual="guided"),
            None,
            None,
            QTargetConfig(None, trust="p * (1 - r)", residual="policy", prior="policy"),
        ),
    ],
    ids=str,
)
def test_target_is_named_by_what_is_trained(config, policy, reference, found):
    target = resolve(config, policy, reference)
    assert target.config == found and target.requested == config
    assert all(f"{name}={value:g}" in target.line for name, value in found.knobs.items())
    assert found.label in target.line and __version__ in target.line
    assert ("hub/teacher" in target.line) == (reference is not None and found.method != "dft")


@pytest.mark.parametrize("name", CLOSED)
def test_resolved_target_is_the_objective_that_was_chosen(name):
    """Read again, with the prior that it names, it is the same mathematics."""
    config = QTargetConfig(name)
    choice = choose_prior(config, PolicyFacts(), "hub/teacher" if config.prior_source == "model" else None)
    again = ResolvedTarget.of(config, choice).config.objective(choice.objective.uses_prior)
    assert again.designs == choice.objective.designs
    assert again.value.func is choice.objective.value.func and again.value.keywords == choice.objective.value.keywords
    assert {knob: again.knobs[knob] for knob in again.knobs} == {
        knob: choice.objective.knobs[knob] for knob in again.knobs
    }


@pytest.mark.parametrize("name", ["/home/me/teacher", "./runs/teacher/", "~/teacher", "a/b/teacher", "C:\\x\\teacher"])
def test_no_local_folder_is_in_a_name(name):
    model = tiny.model()
    model.config._name_or_path = name
    assert choose_prior(QTargetConfig("distill"), PolicyFacts(), model).reference_name == "teacher"
    assert choose_prior(QTargetConfig("distill"), PolicyFacts(), name).reference_name == "teacher"


def test_default_run_says_dft_everywhere(tmp_path, logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny.model().save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    output = tmp_path / "out"
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        str(tmp_path / "policy"),
        steps=1,
        options={"output_dir": str(output), "report_to": "tensorboard", "save_strategy": "steps", "save_steps": 1},
    )
    trainer.train()
    trainer.save_model()
    for folder in (output, output / "checkpoint-1"):
        written = json.loads((folder / "qtarget_config.json").read_text())
        assert written["method"] == "dft" and written["provenance"]["requested"]["method"] == "target_sft"
        assert written["provenance"]["trl_qtarget"] == __version__
        assert QTargetConfig.from_pretrained(folder) == QTargetConfig("dft")
    card = (output / "README.md").read_text()
    assert "`dft` (Dynamic Fine-Tuning)" in card and '"method": "dft"' in card and __version__ in card
    assert str(tmp_path) not in card and "None" not in card.partition("### Training target")[0]
    assert "# Model Card for out\n" in card and "a fine-tuned version of `policy`" in card and 'model="out"' in card
    assert any("Target: `method='dft'` (asked for: `method='target_sft'`)" in line for line in logged())
    # Trackers ask for the arguments; a checkpoint holds them as they were.
    events = EventAccumulator(str(next(output.rglob("events.out.*")).parent)).Reload()
    (told,) = events.Tensors("args/text_summary")
    told = json.loads(told.tensor_proto.string_val[0])
    assert told["qtarget_method"] == "dft" and told["qtarget_prior"] == "none"
    assert told["qtarget_version"] == __version__
    assert "to_dict" not in trainer.args.__dict__ and "qtarget_method" not in trainer.args.to_dict()
    torch.load(output / "checkpoint-1" / "training_args.bin", weights_only=False)


def test_trackers_are_told_knobs_and_prior():
    facts = resolve(QTargetConfig("psft", prior_sync_decay=0.5)).facts()
    assert facts["qtarget_epsilon"] == 0.28 and facts["qtarget_prior_sync_steps"] == 8
    assert facts["qtarget_prior_sync_decay"] == 0.5
    facts = resolve(QTargetConfig(None, trust="min(1, p / 0.1)", residual="prior"), reference="hub/teacher").facts()
    assert facts["qtarget_trust"] == "min(1, p / 0.1)" and facts["qtarget_method"] == "none"
    assert facts["qtarget_prior"] == "the reference model" and facts["qtarget_prior_name"] == "hub/teacher"
    assert resolve(QTargetConfig("cft")).facts()["qtarget_token_weight_column"] == "token_weights"


def test_arguments_are_as_they_were_when_a_training_does_not_begin(monkeypatch):
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), tiny.model(), steps=1, qtarget_config="dft")
    monkeypatch.setattr(trainer, "_run_epoch", lambda *_, **__: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert "to_dict" not in trainer.args.__dict__
    assert sum(type(each).__name__ == "TargetForTrackers" for each in trainer.callback_handler.callbacks) == 0


def test_default_run_goes_on_as_itself_and_as_dft(tmp_path):
    def trainer(config, steps):
        options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
        return make_trainer(
            QTargetSFTTrainer, tiny.text_dataset(), tiny.model(), steps=steps, options=options, qtarget_config=config
        )

    trainer(None, 1).train()
    trainer(None, 2).train(resume_from_checkpoint=True)
    trainer("dft", 3).train(resume_from_checkpoint=True)
    # As a trainer of an earlier version has written it.
    QTargetConfig().save_pretrained(tmp_path / "checkpoint-3")
    trainer(None, 4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="they differ in method"):
        trainer("sft", 5).train(resume_from_checkpoint=True)


def test_page_names_the_resolved_target():
    data = inspect_target(
        tiny.model(), tiny.text_dataset().select(range(2)), ["target_sft", "dft"],
        processing_class=tiny.tokenizer(), progress=False,
    )  # fmt: skip
    ours, dft = data["methods"]
    assert ours["trained"] == "`method='dft'`" and dft["trained"] is None
    assert ours["formula"] == METHODS["dft"].loss and ours["knobs"] == {}
