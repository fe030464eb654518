"""`torch.compile` sees one operation in the fused loss: it traces what is before and after, and the numbers stay."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from trl_qtarget import QTargetConfig, linear_qtarget_loss
from trl_qtarget.gemm import Head
from trl_qtarget.loss.linear import fused_loss


class Model(torch.nn.Module):
    """A tiny language model whose forward ends in the loss."""

    def __init__(self, config: QTargetConfig, public: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 11)
        self.config, self.public = config, public
        self.objective = config.objective(has_prior=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids))).flatten(0, 1)
        if self.public:
            output = linear_qtarget_loss(hidden, self.head.weight, labels.flatten(), self.config, bias=self.head.bias)
        else:
            output = fused_loss(self.objective, hidden, Head(self.head.weight, self.head.bias), labels.flatten())
        return 2 * output.loss + output.nll.mean()


def steps(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Losses and gradients of batches of several sizes."""
    generator, found = torch.Generator().manual_seed(1), []
    for size in (5, 7, 9, 12):
        ids, labels = torch.randint(11, (2, 3, size), generator=generator)
        loss = model(ids, labels.masked_fill(ids == 0, -100))
        found += [loss.detach(), *torch.autograd.grad(loss, parameters)]
    return found


@pytest.mark.parametrize("public", [True, False], ids=["linear_qtarget_loss", "fused_loss"])
@pytest.mark.parametrize("method", ["dft", "gem"])
def test_one_operation_with_the_same_numbers(method, public):
    model = Model(QTargetConfig(method, chunk_tokens=4), public)
    parameters = list(model.parameters())
    expected = steps(model, parameters)
    torch._dynamo.reset()
    counters.clear()
    found = steps(torch.compile(model, backend="eager"), parameters)
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))
    # Before and after the loss; once more each for the sizes that the first was not compiled for.
    assert counters["stats"]["unique_graphs"] <= 4 and counters["frames"]["total"] <= 5
    assert not any("ecompile" in reason for reason in counters["graph_break"])
