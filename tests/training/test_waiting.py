"""Nothing waits for the device inside a step: once the forward pass is enqueued, no operation needs a value from it.

Checked on the CPU by the names of the operations: these are the ones whose CUDA versions wait for the device.
"""

import pytest
import tiny
import torch
from datasets import Dataset
from measured import CLOSED
from torch.utils._python_dispatch import TorchDispatchMode
from training import first_batch, make_trainer

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.loss.zeros import ZeroSearch


WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.bincount.default,
}


class Watch(TorchDispatchMode):
    """Notes every operation that would wait, while `on`."""

    def __init__(self):
        super().__init__()
        self.on, self.found = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        booleans = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if self.on and (function in WAITING or booleans):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", CLOSED)
def test_no_operation_after_the_forward_pass_waits_for_the_device(method, monkeypatch):
    config = QTargetConfig(method)
    # As on a GPU, which is waited for once a call where zeros are worth it; a CPU looks for them at no cost.
    begun = ZeroSearch.__init__
    monkeypatch.setattr(
        ZeroSearch, "__init__", lambda self, objective, _: begun(self, objective, torch.device("cuda"))
    )
    reference = tiny.model(1) if config.objective(has_prior=True).uses_prior else None
    dataset = tiny.text_dataset()
    if config.uses_token_weights:
        ids = [tiny.tokenizer()(text)["input_ids"] for text in dataset["text"]]
        dataset = Dataset.from_dict({"input_ids": ids, "token_weights": [[0.5] * len(row) for row in ids]})
    trainer = make_trainer(QTargetSFTTrainer, dataset, tiny.model(), qtarget_config=config, ref_model=reference)
    batch = first_batch(trainer)
    watch = Watch()
    for model in (trainer.model, reference) if reference else (trainer.model,):
        model.base_model.register_forward_hook(lambda *_: setattr(watch, "on", True))
    with watch:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(20))
        loss.backward()
    looked = ["aten.nonzero.default"] * config.objective(has_prior=True).has_zeros
    assert watch.on and watch.found == looked


def test_the_watch_sees_what_waits():
    watch = Watch()
    watch.on = True
    with watch:
        values = torch.arange(4.0)
        values[values > 1].sum().item()
        (values > 1).nonzero()
    assert len(watch.found) == 3
