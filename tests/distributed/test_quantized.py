"""A quantised model beside an unquantised one: policy and reference have each their own format, at every scale."""

from functools import cache
from pathlib import Path

import pytest


pytest.importorskip("bitsandbytes")

import quantized
import tiny
import torch
from cells import Cell, Result, run
from launch import run_cells
from peft import LoraConfig
from quantized import FORMATS
from test_scale import difference
from training import check_equals_dense, make_trainer, train_target, trainable, worst

from trl_qtarget import QTargetSFTTrainer


def lora():
    return LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def is_quantized(model) -> bool:
    return all(not layer.mlp.up_proj.weight.dtype.is_floating_point for layer in model.model.layers)


# --- one process ---


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("how", ["instance", "path"])
def test_quantized_reference_of_an_unquantized_policy(form, how):
    reference = quantized.quantized(form, steps=12) if how == "instance" else quantized.folder(12, form)
    trained = train_target("asft", model=quantized.plain(), ref_model=reference)
    assert trained.moved() and not is_quantized(trained.trainer.model)
    assert is_quantized(trained.trainer._prior.causal_model)
    check_equals_dense(trained.trainer, quantized.quantized(form, steps=12).eval())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("how", ["instance", "path", *FORMATS])
def test_reference_of_a_quantized_policy(form, how):
    """The reference is unquantised, by instance or by path, or has a format of its own."""
    references = {"instance": lambda: quantized.plain(12), "path": lambda: quantized.folder(12)}
    reference = references.get(how, lambda: quantized.quantized(how, steps=12))()
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        quantized.quantized(form),
        qtarget_config="asft",
        ref_model=reference,
        peft_config=lora(),
    )
    quantized.full_precision(trainer.model)
    start = trainable(trainer.model)
    trainer.train()
    assert all(not torch.equal(value, start[name]) for name, value in trainable(trainer.model).items())
    assert is_quantized(trainer.model.get_base_model())
    assert is_quantized(trainer._prior.causal_model) == (how in FORMATS)
    check_equals_dense(trainer, quantized.quantized(how, 12).eval() if how in FORMATS else quantized.plain(12))


def test_reference_by_path_does_not_take_the_format_of_the_policy():
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        quantized.folder(),
        qtarget_config="asft",
        ref_model=quantized.folder(12),
        quantization_config=quantized.nf4(),
        peft_config=lora(),
    )
    assert is_quantized(trainer.model.get_base_model())
    assert not is_quantized(trainer._prior.causal_model)


# --- several processes ---

BACKENDS = ("ddp", "zero2", "zero3")
CELLS = [
    Cell("asft", "model", reference="nf4", name="nf4-reference"),
    Cell("asft", "model", reference="int8", name="int8-reference"),
    Cell("asft", "model", True, policy="nf4", name="nf4-policy"),
    Cell("asft", "model", True, policy="int8", name="int8-policy"),
    Cell("asft", "base", True, policy="nf4", name="nf4-policy-own-base"),
    Cell("psft", "lagged", True, policy="nf4", name="nf4-policy-lagged"),
    Cell("asft", "model", True, policy="nf4", reference="int8", name="nf4-policy-int8-reference"),
]

WEIGHT_TOLERANCE = 1e-5
# Sums in another order tip an input over to the next int8 value here and there.
LOG_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def truth(folder):
    return cache(lambda cell: run(cell, str(folder / "one"), processes=1))


@pytest.fixture(scope="module")
def job(folder):
    @cache
    def results(backend: str) -> Path:
        own = folder / backend
        own.mkdir()
        run_cells(backend, CELLS, own)
        return own

    return results


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_same_result_on_two_processes(backend, cell, job, truth):
    result, expected = Result.load(job(backend) / str(cell)), truth(cell)
    assert len(result.logs) == len(expected.logs) == 7  # six steps and an evaluation
    for line, other in zip(result.logs, expected.logs, strict=True):
        assert max(difference(other[name], line[name]) for name in other) < LOG_TOLERANCE
    assert worst(result.weights, expected.weights) < WEIGHT_TOLERANCE
    if "prior_held" in expected.facts:
        share = result.facts["prior_held"] / expected.facts["prior_held"]
        # ZeRO-3 leaves half to each of two ranks, but a quantised reference cannot be cut.
        assert 0.5 <= share < 0.55 if backend == "zero3" and not cell.reference else share == 1
