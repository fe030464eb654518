"""The residual `neighbors`: one search per call, exact in every dtype, and defined at the edges."""

import pytest
import torch
from problems import make_problem, relative_error
from rounding import HALF

from trl_qtarget import QTargetConfig, build_target, gemm, linear_qtarget_loss
from trl_qtarget.loss.kernels import plain
from trl_qtarget.target import embeddings


def neighbors(**knobs) -> QTargetConfig:
    return QTargetConfig(None, trust="zero", residual="neighbors", **knobs)


@pytest.fixture
def searched(monkeypatch):
    """Counts the norms that are computed and the labels that are compared with the vocabulary."""
    counts = {"norms": 0, "labels": 0}
    row_norms, project = gemm.row_norms, gemm.project

    def counting_norms(weight, dtype):
        counts["norms"] += 1
        return row_norms(weight, dtype)

    def counting_products(out, hidden, weight, operands):
        counts["labels"] += out.size(0)
        project(out, hidden, weight, operands)

    monkeypatch.setattr(gemm, "row_norms", counting_norms)
    monkeypatch.setattr(gemm, "project", counting_products)
    return counts


def test_the_vocabulary_is_searched_once_per_label_of_a_call(searched, monkeypatch):
    problem = make_problem(61, 37, 6, 30)
    monkeypatch.setitem(plain.BLOCK_ELEMENTS, "cpu", 3 * 37)  # three tokens at a time
    config = neighbors(top_k=5)
    config.chunk_tokens = 10
    expected = linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config)
    tokens = int(problem.scored.sum())
    distinct = len(problem.labels[problem.scored].unique())
    assert distinct < tokens
    assert searched == {"norms": 1, "labels": tokens + distinct}
    # Searched in several pieces, the result is the same.
    monkeypatch.setattr(embeddings, "_SEARCH_ELEMENTS", 4 * 37)
    pieces = linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, config)
    assert relative_error(pieces.token_loss, expected.token_loss) < 1e-14


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_embeddings_are_compared_exactly(dtype, monkeypatch):
    # Raised slice by slice, here of 50 rows, so that no float32 copy of the head is made.
    monkeypatch.setattr(gemm, "_SLICE_ELEMENTS", 50 * 31)
    problem = make_problem(61, 203, 31, 31)
    embeddings, labels = problem.weight.to(dtype), problem.labels
    logits = problem.logits().float()
    own = build_target(logits, labels, neighbors(), embeddings=embeddings)
    truth = build_target(logits.double(), labels, neighbors(), embeddings=embeddings.double())
    assert relative_error(own.probs, truth.probs) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges(dtype):
    logits, labels = torch.zeros(3, 4, dtype=dtype), torch.tensor([0, 1, 3])
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.5], [-1.0, 0.0]], dtype=dtype)  # one has no direction
    # More than there are: all but the label. A tiny temperature: the nearest alone.
    many = build_target(logits, labels, neighbors(top_k=100), embeddings=embeddings).probs
    assert (many[torch.arange(3), labels] == 0).all() and ((many > 0).sum(-1) == 3).all()
    for temperature in (1e-6, 1e-40):
        one = build_target(logits, labels, neighbors(temperature=temperature), embeddings=embeddings).probs
        assert one[0].tolist() == [0, 0, 1, 0] and one[2].tolist() == [0, 1, 0, 0]
        assert torch.allclose(one.sum(-1), torch.ones(3, dtype=dtype))


def test_no_scored_token():
    problem = make_problem(5, 11, 4, 32)
    ignored = torch.full_like(problem.labels, -100)
    target = build_target(problem.logits(), ignored, neighbors(), embeddings=problem.weight)
    torch.testing.assert_close(target.probs, problem.logits().softmax(-1))
