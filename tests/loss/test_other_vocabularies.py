"""A prior of more or fewer tokens than the policy is conditioned on those that both have: exactly, without a copy."""

from dataclasses import replace

import pytest
import torch
from formulas import FORMULAS
from measured import CLOSED
from problems import HEADS, Problem, make_problem
from test_exactness import METHOD_CASES, case_id, check_dense, check_linear
from test_loss_memory import PeakMemory
from thinned import by_kernels, thinned

from trl_qtarget import METHODS, QTargetConfig, build_target, linear_qtarget_loss
from trl_qtarget.loss import choice
from trl_qtarget.loss.chunks import STATISTICS


TOKENS, SHARED, MORE = 13, 37, 8
WITH_PRIOR = [case for case in METHOD_CASES if QTargetConfig(case[0]).objective(has_prior=True).uses_prior]
DIRECTIONS = ["larger", "smaller"]


def other_vocabulary(direction: str, head: str = "plain", more: int = MORE, width: int = 6) -> Problem:
    """A problem whose prior has more tokens than the policy, or fewer, also than some labels."""
    problem = make_problem(TOKENS, SHARED + more, width, 1, head=head)
    if direction == "smaller":
        given = {"prior_weight": problem.prior_weight[:SHARED], "prior_bias": problem.prior_bias[:SHARED]}
        labels = problem.labels.clone()
        labels[[0, 3, 5]] = SHARED + torch.tensor([0, 1, more - 1])  # 5 is one that the policy is sure of
        problem.hidden[5] += 12 * problem.weight[labels[5]] / problem.weight[labels[5]].norm()
        return replace(problem, labels=labels, **given)
    labels = torch.where(problem.labels >= SHARED, problem.labels % SHARED, problem.labels)
    return replace(problem, weight=problem.weight[:SHARED], bias=problem.bias[:SHARED], labels=labels)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "knobs"), WITH_PRIOR, ids=case_id)
def test_methods_equal_their_formulas(name, knobs, direction):
    for head, chunk_tokens in zip(HEADS, (None, 1, 5), strict=True):
        problem = other_vocabulary(direction, head)
        config = QTargetConfig(name, chunk_tokens=chunk_tokens, **knobs)
        check_dense(problem, FORMULAS[name], config, knobs)
        check_linear(problem, FORMULAS[name], config, knobs)


_TRITON = [(*case, direction) for case in WITH_PRIOR for direction in DIRECTIONS]


@pytest.mark.parametrize(
    ("name", "knobs", "direction"),
    thinned(_TRITON, lambda name, knobs, direction: by_kernels(name) and bool(knobs) == (direction == "smaller")),
    ids=case_id,
)
def test_triton_equals_the_formulas(name, knobs, direction):
    pytest.importorskip("triton")
    if not choice._interpreted():
        pytest.skip("on a GPU the kernels are compiled")
    config = QTargetConfig(name, chunk_tokens=5, kernel="triton", **knobs)
    check_linear(other_vocabulary(direction, "capped"), FORMULAS[name], config, knobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_a_label_that_the_prior_cannot_produce(name, dtype):
    """Every number is finite; what is read of the prior is the limit of a probability that goes to zero."""
    problem = other_vocabulary("smaller")
    names = ("hidden", "weight", "bias", "prior_hidden", "prior_weight", "prior_bias", "token_weights")
    values = {name: getattr(problem, name).to(dtype) for name in names}
    hidden, weight = (values.pop(name).requires_grad_() for name in ("hidden", "weight"))
    output = linear_qtarget_loss(hidden, weight, problem.labels, name, sequence_ids=problem.sequence_ids, **values)
    gradients = torch.autograd.grad(output.loss, (hidden, weight))
    for value in (output.token_loss, output.trust, output.label_mass, *gradients):
        assert value.isfinite().all() and value.abs().max() < 1e6
    missing = problem.labels >= SHARED
    limits = {"prift": 0.0, "prift_mass": 0.0, "gift": 0.0, "psft": 0.0, "iw_sft": 16.0}
    if name in limits:
        assert (output.trust[missing] == limits[name]).all()
    if name == "psft":
        assert (output.token_loss[missing] == torch.tensor(-1.28)).all()
    if name == "asft_k3":  # the clamp of its code at a log-ratio of -10
        assert torch.allclose(output.trust[missing], (-output.nll[missing]).exp())
    if METHODS[name].prior:
        assert not output.prior_is_top1[missing].any()


def test_what_the_prior_lacks_gets_no_mass_from_it():
    problem = other_vocabulary("smaller")
    logits = problem.logits()
    target = build_target(logits, problem.labels, "distill", prior_logits=problem.prior_logits())
    assert not target.probs[problem.scored, SHARED:].any()
    guided = build_target(logits, problem.labels, "target_sft", prior_logits=problem.prior_logits())
    others = guided.probs.clone()[problem.scored]
    others.scatter_(1, problem.labels[problem.scored, None], 0.0)
    assert not others[:, SHARED:].any() and guided.probs.isfinite().all()


def test_no_head_is_copied():
    """A larger prior takes no memory that one of the policy's size does not."""
    problem, peaks = other_vocabulary("larger", more=4000, width=64), []
    given = {"prior_hidden": problem.prior_hidden}
    for rows in (SHARED, SHARED, SHARED + 4000):  # what is made once per process is made in the first
        with PeakMemory() as memory:
            given["prior_weight"] = problem.prior_weight[:rows]
            linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, "distill", **given)
        peaks.append(memory.peak)
    assert peaks[2] == peaks[1]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_statistics_know_the_conditioned_prior(direction):
    problem = other_vocabulary(direction)
    for kernel in ("torch", "triton") if choice._installed() and choice._interpreted() else ("torch",):
        config = QTargetConfig("sft_kl", kernel=kernel)
        output = linear_qtarget_loss(
            problem.hidden, problem.weight, problem.labels, config, bias=problem.bias, **problem.linear_arguments()
        )
        favourites = problem.shared_prior_logits().argmax(-1)
        assert torch.equal(output.prior_is_top1[problem.scored] == 1, (favourites == problem.labels)[problem.scored])
        assert all(getattr(output, name).isfinite().all() for name in STATISTICS)
