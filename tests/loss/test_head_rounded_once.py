"""A head in another dtype than the products take: rounded once for all chunks, never raised as a whole."""

import pytest
import torch
from problems import make_problem
from rounding import arguments_of, assert_no_worse, fused, published, results, truth_of
from test_loss_memory import PeakMemory
from torch.utils._python_dispatch import TorchDispatchMode

from trl_qtarget import QTargetConfig, gemm, linear_qtarget_loss


TOKENS, VOCABULARY, WIDTH = 40, 4096, 16
HEAD = VOCABULARY * WIDTH


class Casts(TorchDispatchMode):
    """Notes the dtypes that tensors of the head's size are cast to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].numel() >= HEAD:
            self.found.append(kwargs["dtype"])
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(gemm, "_SLICE_ELEMENTS", HEAD // 16)


def values_of(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(TOKENS, WIDTH, generator=generator).to(hidden_dtype),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=generator).to(weight_dtype),
        "labels": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
    }


def call(values: dict[str, torch.Tensor], method: str, autocast: torch.dtype | None, **prior) -> None:
    leaves = {name: values[name].clone().requires_grad_() for name in ("hidden", "weight")}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = linear_qtarget_loss(
            **leaves, labels=values["labels"], config=QTargetConfig(method, chunk_tokens=8), **prior
        )
    output.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_head_under_autocast_is_rounded_once(dtype):
    values = values_of(torch.float32, torch.float32)
    with Casts() as casts:
        call(values, "dft", dtype)
    assert casts.found == [dtype]  # five chunks, two products each
    other = {"prior_hidden": values["hidden"], "prior_weight": values["weight"].clone()}
    with Casts() as casts:
        call(values, "target_sft", dtype, **other)
    assert casts.found == [dtype, dtype]


def test_a_prior_of_the_same_head_shares_its_copy():
    values = values_of(torch.float32, torch.float32)
    weight = values["weight"].clone().requires_grad_()
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        linear_qtarget_loss(
            values["hidden"],
            weight,
            values["labels"],
            "target_sft",
            prior_hidden=values["hidden"].flip(0),
            prior_weight=weight,
        )
    assert casts.found == [torch.bfloat16]


def test_memory_grows_by_no_more_than_that_copy():
    values = values_of(torch.float32, torch.float32)
    peaks = []
    for autocast in (None, torch.bfloat16):
        with PeakMemory() as memory:
            call(values, "dft", autocast)
        peaks.append(memory.peak)
    # The copy of two bytes, a slice that is raised to float32, and rounded rows of the hidden states.
    assert peaks[1] - peaks[0] <= 2 * HEAD + 4 * HEAD // 16 + 4 * TOKENS * WIDTH


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)],
    ids=str,
)
def test_a_narrower_head_is_raised_by_slices(hidden_dtype, weight_dtype):
    values = values_of(hidden_dtype, weight_dtype)
    with Casts() as casts, torch.no_grad():
        loss = linear_qtarget_loss(**values, config=QTargetConfig("dft", chunk_tokens=8)).loss
    assert casts.found == []
    wide = {name: value if name == "labels" else value.to(hidden_dtype) for name, value in values.items()}
    expected = linear_qtarget_loss(**wide, config=QTargetConfig("dft", chunk_tokens=8)).loss
    # The same products, of other widths.
    torch.testing.assert_close(loss, expected, rtol=8 * torch.finfo(hidden_dtype).eps, atol=0)


@pytest.mark.parametrize("name", ["sft", "target_sft", "iw_sft"])
def test_numbers_of_a_narrower_head(name, monkeypatch):
    monkeypatch.setattr(gemm, "_SLICE_ELEMENTS", 31 * 60)
    problem = make_problem(61, 203, 31, 2)
    values = arguments_of(problem, torch.float32, 0.5)
    for key in ("weight", "prior_weight"):
        values[key] = values[key].bfloat16()
    config = QTargetConfig(name, chunk_tokens=7)
    truth = truth_of(problem, config, values)
    raised = {key: value.float() for key, value in values.items()}
    fast, plain = results(fused, problem, config, values), results(published, problem, config, raised)
    assert_no_worse(fast, plain, truth, {"weight": torch.bfloat16})
