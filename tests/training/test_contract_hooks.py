"""Private methods of transformers' `Trainer` that the package overrides: that they exist, and when they are called."""

import inspect

import tiny
import torch
from training import make_trainer, warm_model
from transformers import Trainer
from trl import SFTTrainer


def trained(cls, **arguments) -> SFTTrainer:
    trainer = make_trainer(cls, tiny.text_dataset(), warm_model(), **arguments)
    trainer.train()
    return trainer


def test_transformers_takes_the_count_of_labels_from_a_method():
    class Counting(SFTTrainer):
        """Says of every step that it has seven labels."""

        given, seen = (), ()

        def _get_num_items_in_batch(self, batch_samples, device):
            self.given += (len(batch_samples),)
            return torch.tensor(7)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.seen += (int(num_items_in_batch),)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = trained(Counting, steps=2, options={"gradient_accumulation_steps": 3})
    assert trainer.given == (3, 3)  # all micro-batches of a step at once
    assert trainer.seen == (7,) * 6
    assert list(inspect.signature(Trainer._get_num_items_in_batch).parameters) == ["self", "batch_samples", "device"]
