"""Forward-mode derivatives: exact for the dense loss, refused by the fused one; never a zero in silence."""

import pytest
import torch
from formulas import FORMULAS
from problems import make_problem, relative_error
from torch.autograd import forward_ad

from trl_qtarget import build_target, linear_qtarget_loss, qtarget_loss


# Two orders of the same float64 operations, as in test_exactness.
TOLERANCE = 1e-12
MESSAGE = "The fused loss has no forward-mode derivative, .*: use `qtarget_loss` on dense logits, or reverse mode."


@pytest.mark.parametrize("name", FORMULAS)
def test_dense(name):
    problem = make_problem(13, 37, 6, 1)
    logits, arguments = problem.logits().detach(), problem.dense_arguments()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return qtarget_loss(z, problem.labels, name, **arguments)

    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    expected = (gradient * direction).sum()
    assert expected.abs() > 1e-6

    own_value, own = torch.func.jvp(loss, (logits,), (direction,))
    assert torch.equal(own_value, value) and relative_error(own, expected) < TOLERANCE
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, direction)
        assert relative_error(forward_ad.unpack_dual(loss(dual)).tangent, expected) < TOLERANCE
        # A target is a constant, in this mode too.
        for part in build_target(dual, problem.labels, name, **arguments):
            assert forward_ad.unpack_dual(part).tangent is None


def test_a_prior_has_no_derivative():
    problem = make_problem(13, 37, 6, 1)
    logits, prior_logits = problem.logits(), problem.prior_logits()

    def loss(t: torch.Tensor) -> torch.Tensor:
        return qtarget_loss(logits, problem.labels, "target_sft", prior_logits=t)

    assert torch.func.jvp(loss, (prior_logits,), (torch.ones_like(prior_logits),))[1] == 0


@pytest.mark.parametrize("argument", ["hidden", "weight", "bias"])
def test_fused(argument):
    problem = make_problem(13, 37, 6, 1)
    given = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}

    def loss(value: torch.Tensor) -> torch.Tensor:
        return linear_qtarget_loss(**{**given, argument: value}, labels=problem.labels, config="dft").loss

    value = given[argument]
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.jvp(loss, (value,), (torch.ones_like(value),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=MESSAGE):
        loss(forward_ad.make_dual(value, torch.ones_like(value)))
    assert loss(value) > 0
