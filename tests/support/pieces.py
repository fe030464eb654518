"""A loss of sequences that lie on two ranks, against the same on one: run by every rank of a job of two.

`torchrun --nproc_per_node 2 pieces.py outcomes.json` calls every case of `CASES` and writes what it raised.
"""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from outcomes import write_outcomes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trl_qtarget import QTargetConfig
from trl_qtarget.gemm import Head
from trl_qtarget.loss.balance import load_balancing_loss
from trl_qtarget.loss.group import SequenceGroup
from trl_qtarget.loss.linear import fused_loss
from trl_qtarget.loss.request import IGNORE_INDEX
from trl_qtarget.training.batch import is_piece, take_columns
from trl_qtarget.training.sequence import RingSequences, SplittableCollator


TOLERANCE = 1e-6
_TOKENS, _WIDTH, _VOCABULARY = 24, 8, 50


def _group() -> SequenceGroup:
    return SequenceGroup(dist.group.WORLD)


def _close(value: Tensor, truth: Tensor) -> None:
    assert (value - truth).abs().max() <= TOLERANCE * truth.abs().max().clamp(min=1e-3), (value, truth)


def per_sequence_trust(cut: int, labelled: slice) -> None:
    """One document has tokens on both ranks; each rank has its own number of labels, or none at all."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, prior_hidden, prior_weight = (
        torch.randn(size, _WIDTH, generator=draw, dtype=torch.float64)
        for size in (_TOKENS, _VOCABULARY, _TOKENS, _VOCABULARY)
    )
    ids = torch.randint(_VOCABULARY, (_TOKENS,), generator=draw)
    labels = torch.full((_TOKENS,), IGNORE_INDEX)
    labels[labelled] = ids[labelled]
    documents = torch.tensor([5] * 7 + [2] * 11 + [9] * 6)
    objective = QTargetConfig("iw_sft", temperature=0.3).objective(has_prior=True)

    def loss(rows: slice, group: SequenceGroup | None):
        leaf, head = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()
        output = fused_loss(
            objective,
            leaf,
            Head(head),
            labels[rows],
            prior_hidden=prior_hidden[rows],
            prior_head=Head(prior_weight),
            sequence_ids=documents[rows],
            num_items_in_batch=int((labels != IGNORE_INDEX).sum()),
            chunk_tokens=5,
            group=group,
        )
        value = output.loss if group is None else group.with_value_of_all(output.loss)
        value.backward()
        return value.detach(), output.trust, leaf.grad, head.grad

    rows = slice(0, cut) if dist.get_rank() == 0 else slice(cut, _TOKENS)
    truth, trust, of_hidden, of_head = loss(slice(None), None)
    value, own_trust, own_hidden, own_head = loss(rows, _group())
    dist.all_reduce(own_head)
    _close(value, truth)
    _close(own_trust, trust[rows])
    _close(own_hidden, of_hidden[rows])
    _close(own_head, of_head)


def ring() -> None:
    """Every rank gets a piece from either end of a row: labels and columns go with the hidden states."""
    draw = torch.Generator().manual_seed(0)
    length, mesh = 16, init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    hidden, weight = (torch.randn(size, _WIDTH, generator=draw, dtype=torch.float64) for size in (2 * length, 50))
    labels = torch.randint(_VOCABULARY, (2, length), generator=draw)
    weights = torch.rand(2, length, generator=draw)
    rows = {"input_ids": labels, "labels": labels, "token_weights": weights}
    batch = SplittableCollator(lambda _: rows, multiple=4, documents=False)(None)
    batch["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    batch = {name: value.clone() for name, value in batch.items()}
    objective = QTargetConfig("cft").objective(has_prior=False)
    count = int((batch["shift_labels"] != IGNORE_INDEX).sum())

    def loss(places: Tensor, labels: Tensor, weights: Tensor, group: SequenceGroup | None):
        leaf = hidden[places.reshape(-1)].clone().requires_grad_()
        given = {"token_weights": weights.reshape(-1), "num_items_in_batch": count, "group": group}
        output = fused_loss(objective, leaf, Head(weight), labels.reshape(-1), **given)
        output.loss.backward()
        return output.loss.detach() if group is None else group.total(output.loss), leaf.grad

    places = torch.arange(2 * length).view(2, length)
    truth, of_hidden = loss(places, batch["shift_labels"], batch["shift_token_weights"], None)
    sequences = RingSequences.__new__(RingSequences)
    buffers = [batch["input_ids"], batch["labels"], batch["shift_labels"], places]
    given = {"buffers": buffers, "buffer_seq_dims": [1] * 4, "no_restore_buffers": set(buffers)}
    context, inputs = sequences.prepared(partial(context_parallel, mesh, **given), batch)
    with context():
        assert is_piece(inputs)
        columns = take_columns(dict(inputs), "x", _VOCABULARY, weights=True)
        value, own = loss(places, columns.next_tokens.labels, columns.weights, _group())
    assert places.size(1) == length // 2
    _close(value, truth)
    _close(own, of_hidden[places.reshape(-1)])


def balance(masked: bool) -> None:
    """The loss of a router is no sum over tokens."""
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(2 * 6, 4, generator=draw) for _ in range(3)]
    mask = (torch.arange(6) < torch.tensor([[6], [4]])).long() if masked else None
    config = SimpleNamespace(num_experts=4, num_experts_per_tok=2)
    whole = [layer.clone().requires_grad_() for layer in logits]
    truth = load_balancing_loss_func(tuple(whole), 4, 2, mask)
    truth.backward()
    columns = slice(0, 3) if dist.get_rank() == 0 else slice(3, 6)
    own = [layer.view(2, 6, 4)[:, columns].reshape(-1, 4).clone().requires_grad_() for layer in logits]
    value = load_balancing_loss(config, tuple(own), None if mask is None else mask[:, columns], _group())
    value.backward()
    _close(value.detach(), truth.detach())
    for mine, every in zip(own, whole, strict=True):
        _close(mine.grad, every.grad.view(2, 6, 4)[:, columns].reshape(-1, 4))


CASES: dict[str, Callable[[], None]] = {
    "trust_of_a_document_on_both_ranks": partial(per_sequence_trust, 12, slice(2, 22)),
    "trust_where_a_rank_has_no_label": partial(per_sequence_trust, 16, slice(3, 15)),
    "ring": ring,
    "balance": partial(balance, False),
    "balance_of_padded_rows": partial(balance, True),
}


if __name__ == "__main__":
    write_outcomes(CASES, *sys.argv[1:])
