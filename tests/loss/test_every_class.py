"""Every causal language model of transformers: the loss and its gradients are those of the model's own logits."""

import every_class
import pytest
import torch
from torch import Tensor, nn

from trl_qtarget import QTargetConfig
from trl_qtarget.loss.body import UnfitHead
from trl_qtarget.loss.head import add_target_head
from trl_qtarget.loss.request import TargetRequest


pytestmark = pytest.mark.slow

# docs/limits.md
REFUSED = ("dory", "prophetnet")
# What a configuration of small sizes could not be found for, or what needs a library that is not installed.
NOT_MADE = (
    "bailing_hybrid",
    "blt",
    "cohere_compass_text",
    "dbrx",
    "deepseek_v2",
    "dots1",
    "dots3_note",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "kimi_linear",
    "lfm2_moe",
    "musicgen",
    "musicgen_melody",
    "qwen4_exp_text",
    "reformer",  # has gradients in training mode alone, and with dropout
    "zamba",
    "zamba2",
)
# Of float32, through a few layers.
TOLERANCE = 1e-4


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, every_class.VOCABULARY - 3, (2, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("kind", every_class.names())
def test_loss_is_that_of_the_models_own_logits(kind, batch):
    if kind in NOT_MADE:
        pytest.skip("not made tiny")
    torch.manual_seed(0)
    model = every_class.tiny_model(kind)
    labels = batch["input_ids"]
    logits = model(**batch).logits
    truth = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = gradients(model, truth)
    add_target_head(model)
    request = TargetRequest(QTargetConfig("sft").objective(has_prior=False), None, None, None, None, "torch")
    if kind in REFUSED:
        with pytest.raises(UnfitHead):
            model(**batch, labels=labels, qtarget=request)
        return
    loss = model(**batch, labels=labels, qtarget=request).tokens.loss
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    size = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= TOLERANCE * max(value.abs().max(), 1e-3 * size), name
