"""What a model does with the product of its head, measured once on the model itself.

No name of a configuration attribute says it for every class: some apply a scale that is called otherwise, some do not
apply the one that their configuration has. So a known product goes through the model's own code, and what comes out is
compared with a scale and a soft-cap.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from .body import UnfitHead, head_module, inference, module_of_product, rows, run_body, run_head, whole


# Two positions more than are compared, so that a forward which counts on their number fails here and not in training.
_TOKENS, _POSITIONS = 10, 8
# Powers of two, in which a scale is read without rounding, up to where every soft-cap in use is reached.
_RULER = [sign * 2.0**power for power in (-13, -8, -4, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 10, 13) for sign in (1, -1)]
# Larger buffers are weights in some quantised format.
_LARGEST_BUFFER = 1 << 20


@dataclass(frozen=True)
class LogitTransform:
    """`logits = softcap · tanh(scale · product / softcap)`, of the first `vocabulary` rows of the head."""

    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    def of(self, product: Tensor) -> Tensor:
        """The logits of a product."""
        logits = product * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def read_logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Scale and soft-cap that a model applies to its logits, by the config attributes that TRL reads."""
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scale = getattr(config, "logits_scaling", None)
        # Granite and MiniCPM3 divide by `logits_scaling`, HyperCLOVA X multiplies by it.
        if scale is not None and config.model_type != "hyperclovax":
            scale = 1 / scale
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


def check_weight(model: PreTrainedModel) -> None:
    """Raise unless the head's weight holds numbers: a quantised one holds codes."""
    head = head_module(model)
    weight = head.weight
    if hasattr(head, "base_layer"):  # PEFT's mark of an adapted layer
        raise UnfitHead(
            f"`lm_head` of this {type(model).__name__} has a PEFT adapter, which the fused loss would leave out: take "
            "it out of `target_modules`, or train it whole with `modules_to_save`. If the model is a `ref_model`, "
            "pass `ref_model.merge_and_unload()`."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or hasattr(weight, "quant_state"):
        raise UnfitHead(
            f"`lm_head` of this {type(model).__name__} is quantised ({weight.dtype}), and the fused loss multiplies "
            "with its weight: keep it out of the quantisation, as transformers does by default (bitsandbytes: "
            '`BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"])`; other formats: `modules_to_not_convert`).'
        )


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A few ordinary tokens `[1, T]`: no padding, no image."""
    weight = head_module(model).weight
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    special: set[int] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                special |= {value} if isinstance(value, int) else set(value if isinstance(value, list) else ())
    known = min([rows(weight), *(getattr(config, "vocab_size", None) or rows(weight) for config in configs)])
    ordinary = [token for token in range(known) if token not in special] or [0]
    step = max(1, len(ordinary) // _TOKENS)
    tokens = [ordinary[number * step % len(ordinary)] for number in range(_TOKENS)]
    input_ids = torch.tensor([tokens], device=_device(model))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def measure(
    model: PreTrainedModel, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> LogitTransform:
    """What a model makes of the product of its head, found in one forward pass that leaves no trace.

    Every rank has to call it where the model is sharded.

    Raises:
        UnfitHead: the head is not `hidden @ weight.T + bias`, or what follows is no scale and soft-cap.
    """
    head, product = head_module(model), None

    def answer(hidden: Tensor) -> Tensor:
        nonlocal product
        _check_product(model, head, hidden[:1, :_POSITIONS])
        product = _product(hidden, rows(head.weight))
        torch.set_grad_enabled(True)  # for what follows the head; what came before it has left no graph
        return product

    with _no_trace(model):
        hidden, outputs = run_body(model, forward, args, kwargs, answer)
    logits = logits_of(outputs)
    if logits.requires_grad:
        raise UnfitHead(
            f"This {type(model).__name__} trains what it does with the product of its LM head, which the fused loss "
            "would leave as it is: freeze these parameters (`requires_grad_(False)`), or use another class."
        )
    return _fit(model, product, logits, hidden.dtype)


def logits_of(outputs: Any) -> Tensor:
    """The logits among a model's outputs, which are a tuple with `return_dict=False`."""
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def _product(hidden: Tensor, vocabulary: int) -> Tensor:
    """Known numbers `[1, P, V]`, of other magnitudes at every position of a token."""
    ruler = torch.tensor(_RULER, device=hidden.device)
    tokens = torch.arange(vocabulary, device=hidden.device)
    positions = torch.arange(min(_POSITIONS, hidden.size(1)), device=hidden.device)
    # 7 has no divisor in common with the length of the ruler.
    return ruler[(tokens + 7 * positions[:, None]) % len(_RULER)][None]


def _check_product(model: PreTrainedModel, head: nn.Module, hidden: Tensor) -> None:
    parameters = module_of_product(head).named_parameters(recurse=False)
    trained = [name for name, value in parameters if name not in ("weight", "bias") and value.requires_grad]
    if trained:
        raise UnfitHead(
            f"`lm_head` of this {type(model).__name__} trains `{trained[0]}` beside its weight and bias, which the "
            "fused loss would leave as it is: freeze it (`requires_grad_(False)`), or use another class."
        )

    def product(module: nn.Module, hidden: Tensor) -> Tensor:
        return F.linear(hidden, whole(module.weight), whole(getattr(module, "bias", None)))

    own, ours = head(hidden), run_head(head, hidden, product)
    difference = (own.float() - ours.float()).abs().nan_to_num(0, 0, 0).max().item()
    size = own.float().abs().nan_to_num(0, 0, 0).max().item()
    if difference > 4 * torch.finfo(own.dtype).eps * size:
        raise UnfitHead(
            f"`lm_head` of this {type(model).__name__} is a {type(head).__name__} that does more than multiply with "
            f"its weight: its results (up to {size:.4g}) differ from `hidden @ weight.T + bias` by {difference:.4g}, "
            "and the fused loss would train toward the latter. Use a model with a linear head."
        )


def _fit(model: PreTrainedModel, product: Tensor, logits: Tensor, dtype: torch.dtype) -> LogitTransform:
    """The transform that turns `product` into `logits`, both `[1, P, V]`; `dtype` is that of the hidden states."""
    name, vocabulary = type(model).__name__, logits.size(-1)
    if logits.shape[:-1] != product.shape[:-1] or vocabulary > product.size(-1):
        raise UnfitHead(
            f"This {name} turns {list(product.shape)} products of its LM head into logits {list(logits.shape)}, which "
            "the fused loss does not: it cannot train this class."
        )
    kept = None if vocabulary == product.size(-1) else vocabulary
    # On the CPU: Apple's devices have no float64.
    product, seen = product[..., :vocabulary].cpu().double(), logits.cpu().double()
    told = LogitTransform(*read_logit_transform(model.config), kept)
    known = [told, LogitTransform(vocabulary=kept)]  # first: a number that is measured is rounded
    scale = (seen[product == _RULER[0]] / _RULER[0]).mean().item()
    highest = seen[product == max(_RULER)].abs().mean().item()
    measured = [LogitTransform(scale, None, kept), LogitTransform(scale, highest or None, kept)]
    if logits.dtype.itemsize < 4:
        measured = []
    # A model may take the logits through its own dtype. The exact fits come first all the same.
    for candidates, precision in ((known + measured, logits.dtype), (known, dtype)):
        for candidate in candidates:
            expected = candidate.of(product)
            if ((seen - expected).abs() <= 4 * torch.finfo(precision).eps * expected.abs()).all():
                return candidate
    expected = told.of(product).flatten()
    worst = (seen.flatten() - expected).abs().nan_to_num(torch.inf).argmax()
    raise UnfitHead(
        f"This {name} changes the product of its LM head in a way that is no scale and no soft-cap: "
        f"{product.flatten()[worst]:.4g} becomes {seen.flatten()[worst]:.4g} in its logits and {expected[worst]:.4g} "
        "in the fused loss, which cannot train this class."
    )


def _device(model: nn.Module) -> torch.device:
    """Where the inputs of a model belong."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; afterwards modules, buffers and torch's random numbers are as before."""
    owners = [(module._buffers, name, value) for module in model.modules() for name, value in module._buffers.items()]
    values = [value for _, _, value in owners if value is not None and not value.is_meta]
    former = [(value, value.clone()) for value in values if value.numel() <= _LARGEST_BUFFER]
    devices = {value.device.index for value in model.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), inference(model):
        try:
            yield
        finally:
            for buffers, name, value in owners:
                buffers[name] = value
            for value, of_before in former:
                value.copy_(of_before)
