"""The dense functions as a tool of study: ignored rows, second derivatives, the smallest vocabularies."""

import pytest
import torch
from designs import RESIDUAL_FORMULAS
from formulas import FORMULAS
from problems import make_problem, relative_error

from trl_qtarget import QTargetConfig, build_target, linear_qtarget_loss, qtarget_loss


# Two orders of the same float64 operations, as in test_exactness.
TOLERANCE = 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_target_of_an_ignored_token_is_the_policy(name, dtype):
    problem = make_problem(29, 37, 6, 20)
    logits, ignored = problem.logits().to(dtype), ~problem.scored
    assert 0 < ignored.sum() < 29
    target = build_target(logits, problem.labels, name, **problem.dense_arguments())
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert target.probs.dtype == target.scale.dtype == statistics
    torch.testing.assert_close(target.probs[ignored], logits.to(statistics).softmax(-1)[ignored])
    assert (target.scale[ignored] == 0).all() and (target.scale[~ignored] > 0).all()


@pytest.mark.parametrize("name", ["sft", "dft", "asft", "gem", "target_sft"])
def test_second_derivatives_are_those_of_the_cross_entropy_to_the_target(name):
    problem = make_problem(5, 7, 4, 21)
    logits, arguments = problem.logits().detach(), problem.dense_arguments()
    target = build_target(logits, problem.labels, name, **arguments)

    def to_target(z: torch.Tensor) -> torch.Tensor:
        return -(target.scale[:, None] * target.probs * z.log_softmax(-1)).sum()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return qtarget_loss(z, problem.labels, name, reduction="sum", **arguments)

    own, expected = (torch.autograd.functional.hessian(function, logits) for function in (loss, to_target))
    scored = problem.scored[:, None, None, None]
    assert expected.norm() > 0 and relative_error(own, expected * scored) < TOLERANCE


@pytest.mark.parametrize("residual", RESIDUAL_FORMULAS)
@pytest.mark.parametrize("trust", ["one", "probability", "entropy", "importance"])
def test_a_vocabulary_of_one_token(trust, residual):
    # Nothing to learn and nothing undecided, but no NaN either: Q is all on the one token.
    config = QTargetConfig(None, trust=trust, residual=residual)
    hidden, weight, labels = torch.randn(3, 2), torch.randn(1, 2, requires_grad=True), torch.zeros(3, dtype=torch.long)
    arguments = {"prior_logits": torch.randn(3, 1), "embeddings": weight.detach()}
    target = build_target(hidden @ weight.T, labels, config, **arguments)
    assert torch.equal(target.probs, torch.ones(3, 1))
    assert qtarget_loss(hidden @ weight.T, labels, config, **arguments).item() == 0
    output = linear_qtarget_loss(
        hidden, weight, labels, config, prior_hidden=hidden, prior_weight=torch.randn_like(weight)
    )
    assert output.loss.item() == 0 and (torch.autograd.grad(output.loss, weight)[0] == 0).all()
    assert (output.trust == (0 if trust == "entropy" else 1)).all()
    assert torch.equal(output.is_top1, torch.ones(3))
