"""Which kernel a loss takes: Triton's where it runs and agrees with plain torch operations, else those operations."""

import logging
from itertools import product

import pytest
import torch


pytest.importorskip("triton")

from measured import CLOSED
from problems import HEADS, make_problem
from thinned import by_ways, one_of_each, thinned
from training import train_target

from trl_qtarget import QTargetConfig, linear_qtarget_loss
from trl_qtarget.gemm import Head
from trl_qtarget.loss import choice
from trl_qtarget.loss.kernels import folded, folded_tile, gradient


pytestmark = pytest.mark.skipif(not choice._interpreted(), reason="on a GPU the kernels are compiled: test_cuda.py")


def batch_of(config: QTargetConfig, head: str = "plain"):
    """Arguments of a batch, as the fused loss makes them."""
    problem = make_problem(8, 37, 6, 4, head=head)
    objective = config.objective(has_prior=True)
    given = problem.head
    return {
        "objective": objective,
        "head": Head(problem.weight, None, given.get("logit_scale", 1.0), given.get("logit_softcap")),
        "hidden": problem.hidden,
        "labels": problem.labels,
        "prior_head": Head(problem.prior_weight) if objective.uses_prior else None,
        "prior_hidden": problem.prior_hidden if objective.uses_prior else None,
        "token_weights": problem.token_weights,
        "sequence_ids": problem.sequence_ids,
        "chunk_tokens": None,
        "observer": None,
    }


_PAIRS = list(product(CLOSED, HEADS))


@pytest.mark.parametrize(
    ("name", "head"), thinned(_PAIRS, lambda *pair: pair in one_of_each(_PAIRS) and by_ways(*pair))
)
def test_kernels_agree_before_they_are_used(name, head):
    state = torch.get_rng_state()
    batch = batch_of(QTargetConfig(name), head)
    assert choice.disagreement(batch, folded.FoldingKernel) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prior_that_lacks_tokens_is_tried_as_one(monkeypatch):
    monkeypatch.setattr(choice, "_agreed", {})
    batch = batch_of(QTargetConfig("target_sft"))
    tried, keys = [], []
    monkeypatch.setattr(choice, "disagreement", lambda *arguments: tried.append(choice._small(arguments[0])))
    for rows in (37, 45, 29):
        batch["prior_head"] = Head(torch.zeros(rows, 4))
        assert choice._agrees(batch)
        keys.append(len(choice._agreed))
    assert keys == [1, 1, 2]  # a larger one is narrowed before a kernel sees it
    heads = [(small["head"].weight.size(0), small["prior_head"].weight.size(0)) for small in tried]
    assert heads[0][1] == heads[0][0] and heads[1][1] < heads[1][0]
    assert (tried[1]["labels"] >= heads[1][1]).any()  # also labels that it lacks


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "_at_home", lambda device: True)
    monkeypatch.setattr(choice, "_agreed", {})
    choice._warn.cache_clear()


def test_auto_takes_triton_where_it_is_at_home_and_right(as_on_a_gpu, monkeypatch):
    tried = []
    check = choice.disagreement
    monkeypatch.setattr(choice, "disagreement", lambda *arguments: tried.append(1) or check(*arguments))
    batch = batch_of(QTargetConfig("target_sft"))
    assert [choice.make_kernel("auto", batch).name for _ in range(3)] == ["triton"] * 3
    assert len(tried) == 1
    assert choice.make_kernel("torch", batch).name == "torch"
    assert choice.make_kernel("auto", batch_of(QTargetConfig("gem"))).name == "triton" and len(tried) == 2


@pytest.mark.parametrize("fault", ["wrong statistic", "wrong gradient", "no compiler"])
def test_auto_falls_back_with_one_warning(as_on_a_gpu, fault, monkeypatch, caplog):
    if fault == "wrong statistic":
        monkeypatch.setattr(folded_tile.FoldedPolicy, "entropy", property(lambda self: self.tile.label_probs))
    elif fault == "wrong gradient":
        monkeypatch.setattr(gradient, "COEFFICIENTS", 4)
        monkeypatch.setattr(folded.FoldingKernel, "slope", lambda self, head, logits: (1.01, 0.0))
    else:
        monkeypatch.setattr(folded.FoldingKernel, "tile", lambda *arguments: 1 / 0)
    with caplog.at_level(logging.WARNING, logger="trl_qtarget"):
        for name in ("target_sft", "target_sft", "asft"):
            assert choice.make_kernel("auto", batch_of(QTargetConfig(name))).name == "torch"
    words = {"wrong statistic": "`entropy`", "wrong gradient": "the gradient of", "no compiler": "ZeroDivisionError"}
    assert [words[fault] in record.message for record in caplog.records] == [True]


def test_a_cpu_takes_the_plain_kernel():
    assert choice.make_kernel("auto", batch_of(QTargetConfig("target_sft"))).name == "torch"


def test_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(choice, "_interpreted", lambda: False)
    hidden, weight, labels = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="`kernel='triton'` does not run on cpu: choose `kernel='auto'`"):
        linear_qtarget_loss(hidden, weight, labels, QTargetConfig("sft", kernel="triton"))
    with pytest.raises(ValueError, match="`kernel='triton'` does not run on cpu"):
        train_target(QTargetConfig("sft", kernel="triton"))
    monkeypatch.setattr(choice, "_installed", lambda: False)
    with pytest.raises(ValueError, match="`kernel='triton'` needs Triton: pip install triton"):
        linear_qtarget_loss(hidden, weight, labels, QTargetConfig("sft", kernel="triton"))
    assert linear_qtarget_loss(hidden, weight, labels, "sft").loss > 0
