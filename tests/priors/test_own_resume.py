"""A resumed run has the prior that it began with: what has been trained since is not taken for its start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training import SAME, Run, check_equals_dense, make_trainer, trainable, warm_model, worst

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors.own import STATE_NAME


BASE, START = QTargetConfig("asft", prior="base"), QTargetConfig("asft", prior="start")


def biased():
    return tiny.model(attention_bias=True)


def lora(seed: int = 5, make: Callable = tiny.model, **options: Any):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model = warm_model(make)
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def run(directory: Path, config: QTargetConfig, model, resume: Path | None = None, **options: Any) -> Run:
    """Six steps with a checkpoint after the third, or the last three of them."""
    options = {"output_dir": str(directory), "save_strategy": "steps", "save_steps": 3} | options
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), model, steps=6, optim="adamw", options=options, qtarget_config=config
    )
    result = Run(trainer, trainable(trainer.model))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return result


CASES = {
    # What a run begins with, what a resumed one is given, and what the prior is.
    "biases": (BASE, lambda: lora(make=biased, bias="all"), None, lambda: warm_model(biased)),
    "trained_adapter": (
        START,
        lambda: lora(init_lora_weights=False),
        lambda: lora(seed=9, init_lora_weights=False),
        lambda: lora(init_lora_weights=False).eval(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_uninterrupted_run(case, tmp_path):
    config, begin, again, prior = CASES[case]
    whole = run(tmp_path / "whole", config, begin())
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run(tmp_path / "resumed", config, (again or begin)(), checkpoint)
    for name in ("loss", "grad_norm", "target/trust", "target/kl"):
        assert resumed.column(name) == pytest.approx(whole.column(name), rel=1e-5), name
    assert worst(resumed.weights, whole.weights) < SAME
    check_equals_dense(resumed.trainer, prior())
    kept = load_file(checkpoint / STATE_NAME)
    assert kept.keys() == (whole.weights.keys() if config is START else {n for n in whole.weights if "bias" in n})


def test_nothing_is_written_where_nothing_but_adapters_is_trained(tmp_path):
    whole = run(tmp_path / "whole", BASE, lora())
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not (checkpoint / STATE_NAME).exists()
    assert worst(run(tmp_path / "resumed", BASE, lora(), checkpoint).weights, whole.weights) < SAME


@pytest.mark.parametrize("case", CASES)
def test_resume_without_the_starting_values_is_refused(case, tmp_path):
    config, begin, *_ = CASES[case]
    run(tmp_path, config, begin())
    (tmp_path / "checkpoint-3" / STATE_NAME).unlink()
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` has no `{STATE_NAME}`"):
        run(tmp_path, config, begin(), tmp_path / "checkpoint-3")


@pytest.mark.parametrize("config, make", [(QTargetConfig("psft"), warm_model), (START, lora)], ids=["lagged", "start"])
def test_a_checkpoint_of_the_weights_alone_cannot_be_resumed(config, make, tmp_path):
    run(tmp_path, config, make(), save_only_model=True)
    with pytest.raises(ValueError, match="`save_only_model=True`"):
        run(tmp_path, config, make(), tmp_path / "checkpoint-3", save_only_model=True)


def test_what_had_been_thawed_before_the_checkpoint_is_not_shared_with_the_resumed_policy(tmp_path):
    def frozen(parameters=("embed_tokens", "norm")):
        model = warm_model()
        for name, value in model.named_parameters():
            value.requires_grad_(not any(part in name for part in parameters))
        return model

    # As if the embeddings had been thawed at the first step. Only the weights are read: the optimiser would hold other
    # parameters.
    run(tmp_path, BASE, frozen(["norm"]))
    resumed = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), frozen(), qtarget_config=BASE)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert not torch.equal(resumed.model.model.embed_tokens.weight, warm_model().model.embed_tokens.weight)
    copy = resumed._prior.causal_model
    assert copy.model.norm.weight is resumed.model.model.norm.weight  # still shared
    check_equals_dense(resumed, warm_model())
