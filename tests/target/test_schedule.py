"""`idft` follows the training: the same numbers as its publication at every share of it, dense and fused."""

import math

import pytest
import torch
from formulas import cross_entropy, log_p, of_label
from problems import make_problem, relative_error

from trl_qtarget import linear_qtarget_loss, qtarget_loss


def published(logits, labels, progress):
    log_probs = log_p(logits)
    p = of_label(log_probs, labels).exp().clamp(min=1e-10)
    phi = p.detach().log() + cross_entropy(log_probs.detach().exp(), log_probs.detach())
    begun = min(1.0, max(0.0, (progress - 0.2) / 0.1))
    exponent = 1 + begun * (torch.exp(-phi).clamp(0.1, 2) - 1)
    return -(p.detach() ** exponent) * p.log()


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.237, 0.3, 1.0])
def test_exponent_follows_the_training(progress):
    problem = make_problem(13, 37, 6, 1)
    logits = problem.logits().detach().requires_grad_()
    losses = published(logits[problem.scored], problem.labels[problem.scored], progress)
    (truth,) = torch.autograd.grad(losses.mean(), logits)
    loss = qtarget_loss(logits, problem.labels, "idft", progress=progress)
    (gradient,) = torch.autograd.grad(loss, logits)
    # Two float64 evaluations of one formula in another order.
    assert relative_error(loss, losses.mean()) < 1e-12
    assert relative_error(gradient, truth, 1e-2) < 1e-12
    fused = linear_qtarget_loss(
        problem.hidden, problem.weight, problem.labels, "idft", bias=problem.bias, progress=progress
    )
    assert relative_error(fused.loss, losses.mean()) < 1e-12


def test_before_its_schedule_it_is_dft():
    problem = make_problem(13, 37, 6, 2)
    early = qtarget_loss(problem.logits(), problem.labels, "idft", progress=0.1)
    assert relative_error(early, qtarget_loss(problem.logits(), problem.labels, "dft")) < 1e-12


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_is_a_share(progress):
    with pytest.raises(ValueError, match=r"`progress=.*` must be the share of the training that is done"):
        qtarget_loss(torch.randn(2, 5), torch.tensor([1, 2]), "idft", progress=progress)
