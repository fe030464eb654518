"""Which documents a batch has, by whatever its collator says of them; `iw_sft` weighs each by itself."""

import pytest
import torch
from test_documents import DOCUMENTS, dataset, trainer_of, trust_by_document
from training import first_batch
from transformers import DataCollatorWithFlattening

from trl_qtarget.training.columns import sequences_of


def numbered(documents: torch.Tensor) -> list[list[int]]:
    """Documents in the order in which they appear, counted from 0 over all rows."""
    seen: dict[int, int] = {}
    return [[seen.setdefault(each, len(seen)) for each in row] for row in documents.tolist()]


LABELS = torch.full((2, 6), 7)
ONES = torch.ones(2, 6, dtype=torch.long)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 0]])
TWO_ROWS = {
    "rows": ({"attention_mask": ONES}, [[0] * 6, [1] * 6]),
    "positions": ({"position_ids": POSITIONS}, [[0, 0, 0, 1, 1, 1], [2, 3, 3, 3, 3, 4]]),
    "mask_and_positions": (
        {"attention_mask": ONES, "position_ids": POSITIONS},
        [[0, 0, 0, 1, 1, 1], [2, 3, 3, 3, 3, 4]],
    ),
    "mask_and_one_document": (
        {"attention_mask": ONES, "position_ids": torch.arange(6)[None].expand(2, 6)},
        [[0] * 6, [1] * 6],
    ),
    "positions_of_all_rows": ({"position_ids": torch.arange(6)[None]}, [[0] * 6, [1] * 6]),
    "positions_from_two": ({"position_ids": POSITIONS + 2}, [[0, 0, 0, 1, 1, 1], [2, 3, 3, 3, 3, 4]]),
    "positions_with_gaps": (
        {"position_ids": torch.tensor([[0, 5, 6, 0, 9, 10]] * 2)},
        [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]],
    ),
    "positions_of_images": ({"position_ids": POSITIONS.expand(3, 2, 6)}, [[0] * 6, [1] * 6]),
    "positions_of_text_and_images": (
        {"position_ids": torch.cat([POSITIONS[None], torch.zeros(3, 2, 6, dtype=torch.long)])},
        [[0, 0, 0, 1, 1, 1], [2, 3, 3, 3, 3, 4]],
    ),
    "index": (
        {"attention_mask": ONES, "seq_idx": torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)},
        [[0, 0, 1, 1, 2, 2], [3] * 6],
    ),
}


@pytest.mark.parametrize("name", TWO_ROWS)
def test_documents_of_two_rows(name):
    batch, expected = TWO_ROWS[name]
    assert numbered(sequences_of({"labels": LABELS, **batch})) == expected


def test_documents_of_one_row_by_their_ends():
    ends = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    assert numbered(sequences_of({"labels": LABELS[:1], "cu_seq_lens_q": ends})) == [[0, 0, 1, 1, 1, 2]]


def test_padding_takes_no_part():
    """A row of two documents and a padded one: what the padding is counted as does not matter, it has no label."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 1], [1, 1, 0, 1, 2, 3]])
    found = sequences_of({"labels": LABELS, "attention_mask": mask, "position_ids": positions})
    kept = [row[on.bool()].tolist() for row, on in zip(found, mask, strict=True)]
    assert [len(set(kept[0][:2])), len(set(kept[0][2:])), len(set(kept[1]))] == [1, 1, 1]
    assert len({kept[0][0], kept[0][2], kept[1][0]}) == 3


COLLATORS = {
    "positions": {},
    "ends": {"return_position_ids": True, "return_flash_attn_kwargs": True},
    "index": {"return_position_ids": True, "return_seq_idx": True},
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", COLLATORS)
def test_documents_of_transformers_collator_weigh_as_padded_ones(name, masked):
    """With a mask beside the positions, as some collators send it, the documents are the same."""
    flatten = DataCollatorWithFlattening(return_tensors="pt", **COLLATORS[name])
    padded, packed = trainer_of(), trainer_of()
    packed.data_collator = flatten
    batch = first_batch(packed)
    truth = trust_by_document(padded, first_batch(padded))
    if masked:
        inputs = dict(batch)
        found = numbered(sequences_of(inputs | {"attention_mask": torch.ones_like(batch["input_ids"])}))
        assert len(set(found[0])) == DOCUMENTS and found == numbered(sequences_of(inputs))
    else:
        assert trust_by_document(packed, batch) == pytest.approx(truth, rel=1e-5)


def two_packed_rows(examples):
    """A collator that packs four documents into each of two rows, with a mask and positions."""
    documents = [example["input_ids"] for example in examples]
    halves = documents[:4], documents[4:]
    rows = [[token for document in half for token in document] for half in halves]
    positions = [[place for document in half for place in range(len(document))] for half in halves]
    longest = max(map(len, rows))

    def pad(values, fill):
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    labels, places = pad(rows, -100), pad(positions, 0)
    labels[places == 0] = -100
    mask = pad([[1] * len(row) for row in rows], 0)
    return {"input_ids": pad(rows, 0), "attention_mask": mask, "position_ids": places, "labels": labels}


def test_packed_rows_with_a_mask_have_a_trust_per_document():
    trainer = trainer_of(data=dataset())
    trainer.data_collator = two_packed_rows
    found = trust_by_document(trainer, first_batch(trainer))
    assert len(found) == DOCUMENTS and len(set(found.values())) > 2
