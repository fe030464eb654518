"""A causal language model without its head, and its head alone, each run by the model's own code.

A model is `logits = after(head(before(inputs)))`. The fused loss needs `before`, whole, whatever layers a class puts
there, and takes the place of the product that `head` is, whatever wraps that module. `probe.py` looks at `after`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class UnfitHead(ValueError):
    """The fused loss would compute other logits than the model."""


def head_module(model: PreTrainedModel) -> nn.Module:
    """The module whose weight `[V, H]` turns hidden states into logits; under PEFT perhaps a wrapper of it."""
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise UnfitHead(
            f"`get_output_embeddings()` of this {type(model).__name__} gives no module with a `weight`, which the "
            "fused loss multiplies hidden states with: load the model with a plain linear LM head."
        )
    return head


def rows(weight: Tensor) -> int:
    """How many tokens a head knows; ZeRO-3 keeps the shape of what it has sharded beside it."""
    return getattr(weight, "ds_shape", weight.shape)[0]


def whole(value: Tensor | None) -> Tensor | None:
    """A weight or bias of which tensor parallelism has left a part on each rank, gathered: every rank calls this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def no_logits(of: Tensor, like: Tensor, vocabulary: int) -> Tensor:
    """Logits `[B, 0, V]` of no position, which hang on `of` in the graph and cost nothing; `like` is `[B, T, H]`."""
    return of.to(like.dtype).reshape(-1)[:0].reshape(1, 0, 1).expand(like.size(0), 0, vocabulary)


class _InPlaceOfHead(nn.Module):
    """Keeps what would enter a head, and gives another answer than its logits."""

    def __init__(self, head: nn.Module, answer: Callable[[Tensor], Tensor] | None):
        super().__init__()
        vars(self)["head"] = head  # not as a child: it is none of this module's
        self.answer = answer
        self.entered: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["head"], name)  # some classes look at the weight's dtype or device

    def forward(self, hidden: Tensor) -> Tensor:
        self.entered.append(hidden)
        if self.answer is not None:
            return self.answer(hidden)
        return no_logits(hidden, hidden, rows(self.head.weight))


@contextmanager
def _replaced(model: nn.Module, module: nn.Module, other: nn.Module) -> Iterator[None]:
    """`other` wherever `model` holds `module`, whose own hooks are not called so: nothing of it is gathered."""
    places = [(each._modules, name) for each in model.modules() for name, child in each._modules.items()]
    places = [(children, name) for children, name in places if children[name] is module]
    try:
        for children, name in places:
            children[name] = other
        yield
    finally:
        for children, name in places:
            children[name] = module


def run_body(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    answer: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """Run a model's own forward without its head.

    Args:
        model: the causal language model.
        forward: its forward.
        args, kwargs: what the forward is called with.
        answer: makes of what enters the head what it gives in this pass; by default logits of no position. It is
            called where the head would be, with all that is wrapped around the modules that contain it.

    Returns:
        What would have entered the head, `[B, T, H]`, and the model's outputs.

    Raises:
        ValueError: the head is not a module that this forward calls once.
    """
    head = head_module(model)
    in_place = _InPlaceOfHead(head, answer)
    with _replaced(model, head, in_place):
        outputs = forward(*args, **kwargs)
    if len(in_place.entered) != 1 or in_place.entered[0].dim() != 3:
        found = f"called {len(in_place.entered)} times"
        if len(in_place.entered) == 1:
            found = f"given a tensor of shape {list(in_place.entered[0].shape)}"
        raise UnfitHead(
            f"The LM head of this {type(model).__name__} is {found} in a forward pass, and the fused loss takes the "
            "place of one call with hidden states `[B, T, H]`: it cannot train this class."
        )
    return in_place.entered[0], outputs


def module_of_product(head: nn.Module) -> nn.Module:
    """The module inside a head that owns the weight in use: PEFT's `modules_to_save` keeps several."""
    weight = head.weight
    return next((module for module in head.modules() if module._parameters.get("weight") is weight), head)


def run_head(head: nn.Module, hidden: Tensor, product: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Call a head with `product(module, hidden)` in the place of its product.

    What FSDP2, ZeRO-3 or Accelerate have put around the module happens around `product`: there the weight is whole and
    on its device, and its gradient is reduced as that of any other parameter.
    """
    module = module_of_product(head)
    # Accelerate's hooks replace `forward`, and keep the one they call.
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    former = vars(module).get(name)
    vars(module)[name] = lambda hidden, *_, **__: product(module, hidden)
    try:
        return head(hidden)
    finally:
        if former is None:
            del vars(module)[name]
        else:
            vars(module)[name] = former


def _stays_in_training(module: nn.Module) -> bool:
    """Whether a module's evaluation mode is about how it multiplies, and not about what.

    To bitsandbytes on a CPU it says to repack 4-bit weights into a layout that no gradient passes through, and to
    round the inputs of 8-bit ones. No other linear layer may stay in training mode: a router that samples is one.
    """
    return isinstance(module, nn.Linear) and any(
        each.__module__.startswith("bitsandbytes.") for each in type(module).__mro__
    )


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no gradient checkpointing; afterwards every module and parameter is as before."""
    modules = [module for module in model.modules() if module.training and not _stays_in_training(module)]
    # PEFT makes every adapter parameter trainable when it turns adapters on again, also one that the user froze.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)
