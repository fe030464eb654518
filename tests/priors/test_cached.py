"""A cached prior trains as the live one does, whatever is done with the dataset, and no half or foreign cache does."""

from pathlib import Path

import pytest
import tiny
import torch
from training import make_trainer, other_model, sft_config, warm_model

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors.store import Manifest, PriorCache
from trl_qtarget.training.caching import write_cache


TEACHER = QTargetConfig(method=None, trust="zero", residual="prior")
V = len(tiny.tokenizer())


def cache_of(dataset, directory: Path, form: str = "top_k", k: int = V, **options) -> Path:
    """A cache of `other_model`."""
    write_cache(teacher_on(dataset), directory, form, k, **options)
    return directory


def teacher_on(dataset, teacher=None, **arguments):
    return make_trainer(
        QTargetSFTTrainer,
        dataset,
        warm_model(),
        options={"max_length": None},
        qtarget_config=TEACHER,
        ref_model=teacher or other_model(),
        **arguments,
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of the prompt dataset by form, of everything that the teacher says."""
    folder = tmp_path_factory.mktemp("caches")
    return {form: cache_of(tiny.prompt_dataset(), folder / form, form) for form in ("hidden", "top_k")}


def run(config, options=None, dataset=None, **prior):
    trainer = make_trainer(
        QTargetSFTTrainer,
        dataset or tiny.prompt_dataset(),
        warm_model(),
        options=options,
        qtarget_config=config,
        **prior,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], {
        name: value.detach() for name, value in trainer.model.named_parameters()
    }


def check_same(config, cache, options=None, tolerance=1e-5, dataset=None):
    lines, weights = run(config, options, dataset, prior_cache=str(cache))
    live, live_weights = run(config, options, dataset, ref_model=other_model())
    for line, other in zip(lines, live, strict=True):
        for name in ("loss", "grad_norm", "target/nll", "target/kl", "target/prior_agreement"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for name, value in weights.items():
        torch.testing.assert_close(value, live_weights[name], rtol=tolerance, atol=tolerance)


PACKED = {"packing": True, "max_length": 48}


@pytest.mark.parametrize("form", ["hidden", "top_k"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("target_sft", {}),
        ("distill", {"max_length": 10, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        ("asft", {"padding_free": True}),
        ("iw_sft", {"packing": True, "packing_strategy": "bfd", "max_length": 30}),
        ("psft", {"dataloader_num_workers": 1}),
    ],
)
def test_train_from_a_cache_is_training_with_the_model(caches, form, method, options):
    config = QTargetConfig(method, prior="model") if method == "psft" else method
    check_same(config, caches[form], options)
