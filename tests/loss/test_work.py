"""Work that is left out, nothing to score, and what a call leaves behind."""

import pytest
import torch
from formulas import FORMULAS
from problems import IGNORE, make_problem
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss, qtarget_loss
from trl_qtarget import gemm as gemm_module


# --- nothing to score ---


@pytest.mark.parametrize("items", [None, 0, 17, torch.tensor(0), torch.tensor(17), torch.tensor(17.0)], ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", FORMULAS)
def test_no_scored_token_gives_a_differentiable_zero(name, tokens, items):
    problem = make_problem(max(tokens, 1), 11, 4, 10)
    for key in ("hidden", "prior_hidden", "token_weights", "sequence_ids"):
        setattr(problem, key, getattr(problem, key)[:tokens])
    problem.labels = torch.full((tokens,), IGNORE)
    leaves = problem.leaves()
    output = linear_qtarget_loss(
        *leaves[:2], problem.labels, name, bias=leaves[2], num_items_in_batch=items, **problem.linear_arguments()
    )
    logits = problem.logits().detach().requires_grad_()
    loss = qtarget_loss(logits, problem.labels, name, **problem.dense_arguments())
    for value, inputs in ((output.loss, leaves), (loss, [logits])):
        assert value.item() == 0 and value.grad_fn is not None
        value.backward()
        assert all((leaf.grad == 0).all() for leaf in inputs)
    assert not output.scored.any() and all(getattr(output, key).shape == (tokens,) for key in ("nll", "kl", "trust"))


# --- work that is left out ---


@pytest.fixture
def rows_multiplied(monkeypatch):
    """Counts the tokens that go through each of the three products."""
    counts = {"project": 0, "backproject": 0, "accumulate_weight": 0}

    def counting(name, product, rows):
        def counted(*args):
            counts[name] += rows(*args)
            product(*args)

        return counted

    for name, operand in (("project", 0), ("backproject", 0), ("accumulate_weight", 1)):
        product = getattr(gemm_module, name)
        monkeypatch.setattr(gemm_module, name, counting(name, product, lambda *args, i=operand: args[i].size(0)))
    return counts


# Passes over the scored tokens: logits of the policy, of the prior, and once more for a trust of whole sequences.
PASSES = {"sft": 1, "dft": 1, "gem": 1, "target_sft": 2, "asft": 2, "psft": 2, "iw_sft": 4}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("mode", ["train", "frozen head", "frozen body", "eval", "nothing asks"])
def test_products(name, mode, rows_multiplied):
    problem = make_problem(29, 37, 6, 11)
    scored = int(problem.scored.sum())
    hidden, weight, bias = problem.leaves()
    hidden.requires_grad_(mode not in ("frozen body", "nothing asks"))
    for leaf in (weight, bias):
        leaf.requires_grad_(mode not in ("frozen head", "nothing asks"))
    with torch.set_grad_enabled(mode != "eval"):
        unclipped = {"epsilon": 1e9} if name == "psft" else {}  # what is clipped is left out: test_zeros.py
        config = QTargetConfig(name, chunk_tokens=4, **unclipped)
        arguments = {**problem.linear_arguments(), "bias": bias}
        loss = linear_qtarget_loss(hidden, weight, problem.labels, config, **arguments).loss
    has_gradient = mode not in ("eval", "nothing asks")
    assert (loss.grad_fn is not None) == has_gradient
    if has_gradient:
        # A gradient that nobody asks for is not even allocated: that of the head is as large as the head.
        kept = [gradient is not None for gradient in loss.grad_fn.gradients]
        assert kept == [leaf.requires_grad for leaf in (hidden, weight, bias)]
        loss.backward()
    assert (hidden.grad is not None) == (mode in ("train", "frozen head"))
    assert (weight.grad is not None) == (bias.grad is not None) == (mode in ("train", "frozen body"))
    assert rows_multiplied == {
        "project": PASSES[name] * scored,  # ignored tokens are not even projected
        "backproject": scored * (hidden.grad is not None),
        "accumulate_weight": scored * (weight.grad is not None),
    }


@pytest.mark.parametrize("knobs", [{"eta": 0.0}, {"prior": "policy"}], ids=str)
def test_a_prior_that_is_not_used_is_not_projected(knobs, rows_multiplied):
    problem = make_problem(29, 37, 6, 12)
    config = QTargetConfig("target_sft", **knobs)
    linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config, **problem.linear_arguments())
    assert rows_multiplied["project"] == problem.scored.sum()


def test_values_are_the_same_in_evaluation():
    problem = make_problem(29, 37, 6, 13)
    hidden, weight, bias = problem.leaves()
    arguments = {**problem.linear_arguments(), "bias": bias}
    train = linear_qtarget_loss(hidden, weight, problem.labels, "asft", **arguments)
    with torch.no_grad():
        evaluation = linear_qtarget_loss(hidden, weight, problem.labels, "asft", **arguments)
    for name in ("loss", "token_loss", "nll", "trust", "label_mass", "kl", "entropy", "is_top1", "scored"):
        assert torch.equal(getattr(train, name), getattr(evaluation, name))


def test_inputs_are_left_as_they_were():
    for name in FORMULAS:
        problem, twin = make_problem(13, 37, 6, 14), make_problem(13, 37, 6, 14)
        evaluate = problem.leaves()
        loss = linear_qtarget_loss(*evaluate[:2], problem.labels, name, **problem.linear_arguments()).loss
        qtarget_loss(problem.logits(), problem.labels, name, **problem.dense_arguments())
        loss.backward()
        for key, value in vars(twin).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(problem, key), value), (name, key)
        assert torch.equal(evaluate[0], twin.hidden) and torch.equal(evaluate[1], twin.weight)


# --- backward ---


def test_a_second_backward_pass_is_refused():
    problem = make_problem(13, 37, 6, 15)
    hidden, weight, _ = problem.leaves()
    loss = linear_qtarget_loss(hidden, weight, problem.labels, "sft").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a first backward pass has already taken: compute the loss again"):
        loss.backward()


def test_gradients_add_up_over_calls():
    problem = make_problem(13, 37, 6, 16)
    hidden, weight, _ = problem.leaves()
    for _ in range(2):
        linear_qtarget_loss(hidden, weight, problem.labels, "sft").loss.backward()
    once = problem.leaves()
    linear_qtarget_loss(*once[:2], problem.labels, "sft").loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0].grad) and torch.equal(weight.grad, 2 * once[1].grad)
