"""The bf16 path of a CUDA device, whose products give float32 results. Skipped without one, but for the signatures."""

import dataclasses

import pytest
import torch
from formulas import FORMULAS
from problems import Problem, make_problem
from rounding import NAMES, arguments_of, assert_no_worse, fused, published, results, truth_of

from trl_qtarget import QTargetConfig, gemm, linear_qtarget_loss


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NEIGHBORS = QTargetConfig(None, trust="probability", residual="neighbors")


def test_the_products_of_the_cuda_path_exist_in_this_pytorch():
    # What `gemm` calls with `out_dtype=` and `out=`; a version that renames them says so here, without a GPU.
    for operator, operands in (
        (torch.ops.aten.mm, ["self", "mat2"]),
        (torch.ops.aten.addmm, ["self", "mat1", "mat2"]),
    ):
        arguments = [argument.name for argument in operator.dtype_out._schema.arguments]
        assert arguments[: len(operands) + 1] == [*operands, "out_dtype"] and arguments[-1] == "out"


def on_device(values):
    """A problem, or a dictionary of tensors, on the GPU."""
    if isinstance(values, Problem):
        return dataclasses.replace(values, **on_device(vars(values)))
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.fixture
def mixed_products(monkeypatch):
    """Counts the products that took the mixed path."""
    answers, asked = [], gemm.mixed_gemm_supported

    def recorded(*given):
        answers.append(asked(*given))
        return answers[-1]

    monkeypatch.setattr(gemm, "mixed_gemm_supported", recorded)
    return answers


@needs_cuda
@pytest.mark.parametrize("config", [*FORMULAS, NEIGHBORS], ids=lambda case: getattr(case, "residual", case))
def test_bf16_is_no_worse_than_the_plain_bf16_version(config, mixed_products):
    config = dataclasses.replace(QTargetConfig.coerce(config), chunk_tokens=24)
    for shape in [(61, 208, 32, 2), (61, 203, 31, 2)]:  # aligned and not
        problem = make_problem(*shape)
        values = arguments_of(problem, torch.bfloat16, 0.5)
        truth = truth_of(problem, config, values)  # in float64, on the CPU
        fast, plain = (
            {name: value.cpu() for name, value in results(way, on_device(problem), config, on_device(values)).items()}
            for way in (fused, published)
        )
        assert mixed_products and all(mixed_products)
        assert_no_worse(fast, plain, truth, dict.fromkeys(NAMES, torch.bfloat16))


@needs_cuda
def test_logits_are_not_rounded_to_bf16_before_the_softmax():
    problem = make_problem(61, 208, 32, 3)
    values = arguments_of(problem, torch.bfloat16)
    truth = truth_of(problem, "sft", values)
    fast, plain = (results(way, on_device(problem), "sft", on_device(values)) for way in (fused, published))
    assert (fast["loss"].cpu() - truth["loss"]).abs() < 0.1 * (plain["loss"].cpu() - truth["loss"]).abs()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_bf16_prior_beside_a_wider_policy(dtype):
    # A bf16 product has float32 results at most, so beside a float64 policy the prior is raised.
    problem = make_problem(13, 37, 6, 4)
    prior = {name: getattr(problem, name).bfloat16() for name in ("prior_hidden", "prior_weight", "prior_bias")}
    hidden, weight = problem.hidden.to(dtype), problem.weight.to(dtype)
    expected = linear_qtarget_loss(hidden.double(), weight.double(), problem.labels, "target_sft", **prior).loss
    loss = linear_qtarget_loss(hidden.cuda(), weight.cuda(), problem.labels.cuda(), "target_sft", **on_device(prior))
    assert loss.loss.dtype == dtype
    torch.testing.assert_close(loss.loss.cpu().double(), expected, rtol=100 * torch.finfo(dtype).eps, atol=0)


@needs_cuda
@pytest.mark.parametrize("name", ["dft", "target_sft"])
def test_memory_on_the_device(name):
    # One chunk of 256 MiB (two with a prior), and about one more in blocks; 128 MiB stand for gradients and workspace.
    generator = torch.Generator("cuda").manual_seed(5)
    hidden, weight = (
        torch.randn(size, 16, generator=generator, device="cuda").bfloat16().requires_grad_() for size in (4096, 65536)
    )
    labels = torch.randint(65536, (4096,), generator=generator, device="cuda")
    prior = {"prior_hidden": hidden.detach(), "prior_weight": weight.detach()} if name == "target_sft" else {}
    torch.mm(hidden[:8].detach(), weight.detach().t())  # the workspace of the first product
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_qtarget_loss(hidden, weight, labels, name, **prior).loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < (256 * (3 if prior else 2) + 128) * 2**20
