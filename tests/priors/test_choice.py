"""Which prior a target has is decided in one place, and whoever asks gets the same answer or the same refusal."""

import re

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training import make_trainer, warm_model

from trl_qtarget import (
    METHODS,
    PolicyFacts,
    PriorKind,
    QTargetConfig,
    QTargetSFTTrainer,
    choose_prior,
    inspect_target,
)


PLAIN, ADAPTED = PolicyFacts(), PolicyFacts(adapters={"default": LoraConfig()})
FREE = {"method": None, "trust": "probability", "residual": "guided"}
# Configuration -> kind for a plain policy, under PEFT, and with a reference model beside each of the two.
KINDS = [
    ({"method": "sft"}, "none", "none", "none"),
    ({"method": "target_sft", "eta": 0.0}, "none", "none", "none"),
    ({"method": "label_smoothing"}, "none", "none", "none"),
    ({"method": "target_sft"}, "policy", "adapters_off", "reference"),
    ({"method": "target_sft", "prior": "policy"}, "policy", "policy", "policy"),
    ({"method": "target_sft", "prior": "base"}, "starting_copy", "adapters_off", "reference"),
    ({"method": "target_sft", "prior": "start"}, "starting_copy", "start", "reference"),
    ({"method": "target_sft", "prior": "lagged"}, "lagged", "lagged", "lagged"),
    ({"method": "target_sft", "prior": "model"}, ValueError, ValueError, "reference"),
    (FREE, "policy", "adapters_off", "reference"),
    (FREE | {"prior": "base"}, "starting_copy", "adapters_off", "reference"),
    ({"method": "asft"}, "starting_copy", "adapters_off", "reference"),
    ({"method": "iw_sft"}, "starting_copy", "adapters_off", "reference"),
    ({"method": "psft"}, "lagged", "lagged", "lagged"),
    ({"method": "psft", "prior": "base"}, "starting_copy", "adapters_off", "reference"),
    ({"method": "distill"}, ValueError, ValueError, "reference"),
    ({"method": "iw_sft", "prior": "start"}, "starting_copy", "start", "reference"),
    ({"method": "psft", "prior": "start"}, "starting_copy", "start", "reference"),
    ({"method": "distill", "prior": "start"}, "starting_copy", "start", "reference"),
    ({"method": "distill", "prior": "base"}, "starting_copy", "adapters_off", "reference"),
]


@pytest.mark.parametrize("fields, plain, adapted, beside", KINDS)
def test_kind(fields, plain, adapted, beside):
    config = QTargetConfig(**fields)
    for policy, reference, expected in [
        (PLAIN, None, plain),
        (ADAPTED, None, adapted),
        (PLAIN, "hub/teacher", beside),
        (ADAPTED, "hub/teacher", beside),
    ]:
        if expected is ValueError:
            with pytest.raises(ValueError, match="needs a reference model and `ref_model` is None"):
                choose_prior(config, policy, reference)
            continue
        choice = choose_prior(config, policy, reference)
        assert choice.kind is PriorKind(expected)
        runs = choice.kind not in (PriorKind.NONE, PriorKind.POLICY)
        assert choice.objective.uses_prior == runs == (choice.words is not None)
        assert (choice.reference is not None) == (choice.kind is PriorKind.REFERENCE)


def test_every_method_has_a_prior_with_its_teacher():
    for method, row in METHODS.items():
        choice = choose_prior(QTargetConfig(method), PLAIN, "hub/teacher")
        reads_it = row.prior not in (None, "lagged")
        assert (choice.kind is PriorKind.REFERENCE) == reads_it, method
        assert any("is not used" in warning for warning in choice.warnings) == (not reads_it), method


def test_what_is_loaded_is_named_before_it_is_loaded():
    choice = choose_prior(QTargetConfig("asft"), PolicyFacts.of("hub/policy"))
    assert choice.kind is PriorKind.STARTING_COPY and choice.starting_path == "hub/policy"
    assert choose_prior(QTargetConfig("asft"), PolicyFacts.of("hub/policy", LoraConfig())).kind is (
        PriorKind.ADAPTERS_OFF
    )


def test_weights_that_are_sharded_already_are_exchanged_and_not_copied():
    assert choose_prior(QTargetConfig("asft"), PolicyFacts(sharded=True)).kind is PriorKind.START


def pissa():
    return get_peft_model(
        warm_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    )


def adapted():
    return get_peft_model(warm_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("make", [warm_model, adapted, pissa], ids=["plain", "adapted", "pissa"])
@pytest.mark.parametrize(
    "fields", [{"method": "sft"}, {"method": "asft"}, {"method": "psft"}, {"method": "distill"}, FREE], ids=str
)
def test_inspection_refuses_what_training_refuses(make, fields):
    config = QTargetConfig(**fields)

    def train():
        make_trainer(QTargetSFTTrainer, tiny.text_dataset(4), make(), qtarget_config=config)

    def inspect():
        rows = Dataset.from_dict({"text": tiny.sentences(2, seed=1)})
        inspect_target(make(), rows, [config], processing_class=tiny.tokenizer(), progress=False)

    try:
        train()
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            inspect()
    else:
        inspect()


def test_inspection_refuses_the_policy_as_its_own_reference():
    model = warm_model()
    rows = Dataset.from_dict({"text": tiny.sentences(2, seed=1)})
    with pytest.raises(ValueError, match="`ref_model` is the model being trained"):
        inspect_target(model, rows, ["asft"], ref_model=model, processing_class=tiny.tokenizer(), progress=False)
