"""What a reference model takes over from the options that load the policy: nothing that says which model it is."""

import pytest
import tiny
from training import make_trainer, warm_model

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.priors.loading import SHARED_OPTIONS, reference_options


def test_shared_options_are_taken_over():
    options = {name: object() for name in SHARED_OPTIONS}
    assert reference_options(options) == options | {"trust_remote_code": False}
    assert reference_options(None) == reference_options({}) == {"trust_remote_code": False}


@pytest.mark.parametrize(
    "name",
    [
        *("revision", "code_revision", "subfolder", "variant", "gguf_file", "config", "state_dict", "key_mapping"),
        *("quantization_config", "num_hidden_layers", "rope_parameters", "vocab_size", "tie_word_embeddings"),
        *("adapter_kwargs", "output_loading_info", "ignore_mismatched_sizes", "trust_remote_code"),
    ],
)
def test_all_else_is_the_policys_alone(name):
    assert reference_options({name: "of the policy", "dtype": "float32"}) == {
        "dtype": "float32",
        "trust_remote_code": False,
    }


def test_code_is_trusted_for_this_model_only():
    assert reference_options({"trust_remote_code": True})["trust_remote_code"] is False
    assert reference_options({}, trust_remote_code=True)["trust_remote_code"] is True


def test_a_teacher_by_path_is_not_shaped_by_the_policy(tmp_path):
    for name in ("policy", "teacher"):
        warm_model().save_pretrained(tmp_path / name)
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(4),
        str(tmp_path / "policy"),
        qtarget_config="distill",
        ref_model=str(tmp_path / "teacher"),
        options={"model_init_kwargs": {"num_hidden_layers": 1}},
    )
    layers = [len(model.base_model.layers) for model in (trainer.model, trainer._prior.causal_model)]
    assert layers == [1, 2]
