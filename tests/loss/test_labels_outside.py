"""Labels that the head has no row for: never a number computed from other memory, whatever the kernel."""

import pytest
import torch
from measured import CLOSED
from problems import make_problem
from thinned import thinned

from trl_qtarget import QTargetConfig
from trl_qtarget.gemm import Head
from trl_qtarget.loss import choice
from trl_qtarget.loss.chunks import STATISTICS
from trl_qtarget.loss.linear import fused_loss
from trl_qtarget.target.checks import check_labels_inside


# One past the head (an image token that is only ever read), further on, a mask of the collator's own, and two numbers
# that are inside again once they are cut to 32 bits, or far outside of what the process may read.
OUTSIDE = [37, 46, -1, -99, 2**32 + 5, -(2**40)]
VOCABULARY, TOKENS = 37, 13


def evaluate(config: QTargetConfig, *outside: int):
    """The loss as the trainer calls it, without a check, with these labels at its end; and the hidden gradient."""
    problem = make_problem(TOKENS, VOCABULARY, 6, 2)
    labels = problem.labels.clamp(min=0)
    labels[TOKENS - len(outside) :] = torch.tensor(outside, dtype=torch.long)
    hidden = problem.hidden.clone().requires_grad_()
    objective = config.objective(has_prior=True)
    output = fused_loss(
        objective,
        hidden,
        Head(problem.weight, problem.bias),
        labels,
        prior_hidden=problem.prior_hidden,
        prior_head=Head(problem.prior_weight, problem.prior_bias),
        token_weights=problem.token_weights,
        sequence_ids=torch.arange(TOKENS),
        kernel=config.kernel,
    )
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    return output, gradient


_SOME = ("sft", "gem", "target_sft")


@pytest.mark.parametrize("method", thinned(CLOSED, lambda method: method in _SOME))
def test_the_triton_kernels_make_such_a_token_nan_and_leave_the_others(method):
    pytest.importorskip("triton")
    if not choice._interpreted():
        pytest.skip("on a GPU the kernels are compiled")
    config = QTargetConfig(method, kernel="triton")
    output, gradient = evaluate(config, *OUTSIDE)
    good, good_gradient = evaluate(config)
    others, those = slice(0, TOKENS - len(OUTSIDE)), slice(TOKENS - len(OUTSIDE), TOKENS)
    assert output.loss.isnan() and output.token_loss[those].isnan().all() and output.nll[those].isnan().all()
    assert gradient[those].isnan().all() and (output.is_top1[those] == 0).all()
    assert torch.equal(gradient[others], good_gradient[others])
    for name in ("token_loss", "nll", "entropy", "trust"):
        assert torch.equal(getattr(output, name)[others], getattr(good, name)[others]), name


@pytest.mark.parametrize("label", OUTSIDE)
def test_the_plain_kernel_refuses_it(label):
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        evaluate(QTargetConfig("sft", kernel="torch"), label)


def test_the_edges_of_the_head_are_inside():
    pytest.importorskip("triton")
    for label in (0, VOCABULARY - 1):
        found = [evaluate(QTargetConfig("asft", kernel=kernel), label) for kernel in ("torch", "triton")]
        for name in STATISTICS:
            one, other = (getattr(output, name) for output, _ in found)
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outside", [11, 16, -1, -99, 2**40])
def test_a_check_before_the_forward_pass(outside):
    labels = torch.tensor([0, 10, -100, outside, 2, -100])
    index = (labels != -100).nonzero().squeeze(1)
    message = (
        rf"`labels` holds the id {outside}, outside the vocabulary of 11: mark tokens that should not be scored with "
        r"`ignore_index` \(-100\)\."
    )
    with pytest.raises(ValueError, match=message):
        check_labels_inside(labels, index, 11)
    labels[3] = 4
    check_labels_inside(labels, index, 11)
    check_labels_inside(labels, index[:0], 11)
