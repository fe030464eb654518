"""A plugin of axolotl that writes down what its trainer is given: starting weights and batches.

It stands in the recipes of `test_axolotl.py` after ours, and `axolotl_replay.py` reads what it writes.
"""

from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin


class Recorder(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        folder = Path(cfg.output_dir)
        own, batches = trainer.training_step, []
        start = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}

        def step(model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            torch.save({"start": start, "batches": batches}, folder / "recorded.pt")
            return own(model, inputs, *args, **kwargs)

        trainer.training_step = step
