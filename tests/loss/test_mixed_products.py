"""Products of bfloat16 operands with float32 sums: tried on the device, and replaced where they are not there.

A GPU's are put into this CPU's PyTorch: computed in float32, refused or wrong as some builds have it.
"""

import logging

import pytest
import torch
from problems import make_problem
from torch import Tensor

from trl_qtarget import QTargetConfig, gemm, linear_qtarget_loss


MM, ADDMM = torch.mm, torch.addmm
# What differs is the order of float32 sums, over 13 tokens or 203 columns.
TOLERANCE = 1e-6


def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    if out_dtype is None:
        return MM(left, right, out=out)
    assert left.dtype == right.dtype == torch.bfloat16 and out.dtype == out_dtype == torch.float32
    return MM(left.float(), right.float(), out=out)


def addmm(onto: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    assert left.dtype == right.dtype == torch.bfloat16 and onto.dtype == out.dtype == out_dtype == torch.float32
    return ADDMM(onto, left.float(), right.float(), out=out)


def refusing(*args, out_dtype: torch.dtype | None = None, **kwargs) -> Tensor:
    """Of PyTorch 2.8 and 2.9 for `addmm` onto float32, and of ROCm for both."""
    if out_dtype is None:
        return MM(*args, **kwargs)
    raise RuntimeError("out_dtype is not supported here\nand a long trace")


def without_out_dtype(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    return MM(left, right, out=out)


def rounding(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor) -> Tensor:
    """Sums that are rounded to bfloat16 on the way."""
    return MM(left, right, out=out) if out_dtype is None else out.copy_(MM(left, right))


def forgetting(onto: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """What was there before is not added to."""
    return MM(left.float(), right.float(), out=out)


DEVICES = {
    "both": (mm, addmm),
    "no addmm": (mm, refusing),
    "wrong addmm": (mm, forgetting),
    "refused": (refusing, refusing),
    "rounded": (rounding, refusing),
    "no such argument": (without_out_dtype, refusing),
}


@pytest.fixture
def device(monkeypatch):
    """Lets the CPU have the products of another device; returns how often each was asked for mixed sums."""

    def choose(name: str) -> dict[str, int]:
        asked = {"mm": 0, "addmm": 0}

        def counted(product: str, function):
            def call(*args, **kwargs):
                asked[product] += "out_dtype" in kwargs
                return function(*args, **kwargs)

            return call

        for product, function in zip(("mm", "addmm"), DEVICES[name], strict=True):
            monkeypatch.setattr(torch, product, counted(product, function))
        gemm._tried.cache_clear()
        return asked

    yield choose
    gemm._tried.cache_clear()


def results(name: str, **changes) -> dict[str, Tensor]:
    """Loss and gradients in bfloat16."""
    problem = make_problem(13, 203, 31, 2, bias=False)
    hidden, weight = ((0.5 * value).bfloat16().requires_grad_() for value in (problem.hidden, problem.weight))
    prior = {"prior_hidden": problem.prior_hidden.bfloat16(), "prior_weight": problem.prior_weight.bfloat16()}
    config = QTargetConfig(name, chunk_tokens=4, **changes)
    loss = linear_qtarget_loss(hidden, weight, problem.labels, config, **prior).loss
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("elements", [None, 31 * 60], ids=["one slice", "four slices"])
@pytest.mark.parametrize("name", ["sft", "target_sft", "gem"])
@pytest.mark.parametrize("products", [name for name in DEVICES if name != "both"])
def test_what_takes_the_place_of_a_product(products, name, elements, device, monkeypatch):
    if elements is not None:
        monkeypatch.setattr(gemm, "_SLICE_ELEMENTS", elements)
    plain = results(name)
    device("both")
    mixed = results(name)
    asked = device(products)
    found = results(name)
    if DEVICES[products][0] is mm:  # the gradient over the logits is rounded for the products, as it is with both
        assert asked["mm"] > 1 and asked["addmm"] == 1
        expected = mixed
    else:
        assert asked["addmm"] <= 1 and asked["mm"] <= 1  # once, to try
        expected = plain
    for key, value in found.items():
        # Of float32 numbers in another order; those that are kept in bfloat16 may fall on the neighbouring one.
        tolerance = TOLERANCE if value.dtype == torch.float32 else 2**-8
        assert (value.double() - expected[key].double()).norm() <= tolerance * expected[key].double().norm(), key
    if expected is plain:
        assert all(torch.equal(value, plain[key]) for key, value in found.items())


@pytest.mark.parametrize("products", ["both", "no addmm", "wrong addmm"])
def test_the_sums_over_chunks_are_float32(products, device, monkeypatch):
    monkeypatch.setattr(gemm, "_SLICE_ELEMENTS", 31 * 60)
    generator = torch.Generator().manual_seed(0)
    grads, hidden = (torch.randn(7, size, generator=generator).bfloat16() for size in (203, 31))
    start = torch.randn(203, 31, generator=generator)
    device(products)
    out = start.clone()
    gemm.accumulate_weight(out, grads, hidden, torch.bfloat16)
    truth = start.double() + grads.double().t() @ hidden.double()
    # Eight float32 additions.
    assert (out - truth).abs().max() <= 8 * 2**-24 * truth.abs().max()


def test_what_is_there_is_tried_once_and_the_refusal_is_said(device, caplog):
    out, asked = torch.zeros(2, 2), device("no addmm")
    for _ in range(3):
        assert gemm.mixed_gemm_supported("mm", torch.bfloat16, out)
        refused = gemm.mixed_gemm_supported("addmm", torch.bfloat16, out)
        assert not refused and refused.refusal == "RuntimeError: out_dtype is not supported here"
    assert asked == {"mm": 1, "addmm": 1}
    device("wrong addmm")
    assert gemm.mixed_gemm_supported("addmm", torch.bfloat16, out).refusal == "its results are wrong"
    device("rounded")
    assert gemm.mixed_gemm_supported("mm", torch.bfloat16, out).refusal == "its results are wrong"
    device("no such argument")
    assert "unexpected keyword argument 'out_dtype'" in gemm.mixed_gemm_supported("mm", torch.bfloat16, out).refusal
    assert not caplog.records  # of a CPU nobody expects it


def test_other_dtypes_are_not_tried(device):
    asked = device("both")
    for operands, dtype in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float64),
    ):
        support = gemm.mixed_gemm_supported("mm", operands, torch.zeros(2, 2, dtype=dtype))
        assert not support and support.refusal == f"{operands} operands are not multiplied into {dtype} results"
    assert asked == {"mm": 0, "addmm": 0}


def test_a_gpu_without_the_products_says_so(device, monkeypatch, caplog):
    device("no addmm")
    monkeypatch.setattr(torch, "full", lambda *args, device, **kwargs: torch.ones(()).new_full(*args[:2]))
    with caplog.at_level(logging.WARNING, logger="trl_qtarget"):
        support = gemm._tried("addmm", torch.device("cuda", 0))
    assert not support and "`torch.addmm` does not give float32 sums of bfloat16 operands on cuda:0" in caplog.text


def test_this_cpu_as_it_is():
    gemm._tried.cache_clear()
    for product in ("mm", "addmm"):
        support = gemm.mixed_gemm_supported(product, torch.bfloat16, torch.zeros(2, 2))
        assert bool(support) == (support.refusal is None)
