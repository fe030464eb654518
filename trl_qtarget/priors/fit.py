"""Whether a model can be the reference of a policy: refusals, before anything is changed."""

from typing import Any

from accelerate.logging import get_logger
from accelerate.utils.other import is_compiled_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from .base import base_model_of


logger = get_logger(__name__)


def check_kind(name: str, model: Any) -> None:
    """Raise unless a loaded model is a decoder with an LM head, perhaps under PEFT; `name` is the argument's."""
    inner = base_model_of(model)
    if is_compiled_module(inner):
        raise ValueError(
            f"`{name}` is compiled, so nothing can take the place of its head: pass the model inside, its "
            "`_orig_mod`. `torch_compile=True` in the `SFTConfig` compiles the policy."
        )
    if not hasattr(inner, "get_output_embeddings"):  # which wrappers hand on
        raise ValueError(
            f"`{name}` is a `{type(inner).__name__}`, which is no model of transformers: pass a causal language "
            "model, as `AutoModelForCausalLM.from_pretrained` loads it."
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"`{name}` is a `{type(inner).__name__}`, an encoder-decoder model: labels are the tokens of a text "
            "that a decoder goes on with. Pass a causal language model."
        )
    head = inner.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(
            f"`{name}` is a `{type(inner).__name__}`, which has no LM head: pass the causal language model that it "
            "belongs to, as `AutoModelForCausalLM.from_pretrained` loads it."
        )


def check_separate(reference: nn.Module, policy: nn.Module) -> None:
    """Raise where freezing the reference model would freeze what is trained."""
    held = {_place(value) for value in reference.parameters() if not value.is_meta and value.numel()}
    shared = [name for name, value in policy.named_parameters() if value.requires_grad and _place(value) in held]
    if shared:
        names = ", ".join(f"`{name}`" for name in shared[:3]) + (", …" if shared[3:] else "")
        raise ValueError(
            f"`ref_model` shares {len(shared)} trained parameters with `model` ({names}): it "
            "would move with the policy, and freezing it would freeze them. Give the policy copies "
            "(`copy.deepcopy`), or freeze what is meant to be shared."
        )


def _place(value: nn.Parameter) -> int:
    # Of sharded ones the memory is empty or a share, and then the parameter itself is compared.
    place = value.data_ptr() if type(value.data) is Tensor else 0
    return place or id(value)


class Positions:
    """How long a row a reference model can read.

    Args:
        model: the reference model.
    """

    def __init__(self, model: PreTrainedModel):
        tables = [
            module.num_embeddings - getattr(module, "offset", 0)
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and ("position" in name or "wpe" in name) and "relat" not in name
        ]
        self.learned = min(tables, default=None)
        trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.trained = trained if isinstance(trained, int) else None
        self._warned = False

    def check(self, inputs: Any) -> None:
        """Raise where a row is longer than the model has positions; warn once where it has not been trained so far."""
        length = inputs["input_ids"].size(1)
        if length <= min((limit for limit in (self.learned, self.trained) if limit), default=length):
            return
        if "position_ids" in inputs:
            length = int(inputs["position_ids"].max()) + 1
        if self.learned is not None and length > self.learned:
            raise ValueError(
                f"`ref_model` has {self.learned} positions and a text has {length} tokens: set `max_length` to at "
                f"most {self.learned}, or pass another reference model."
            )
        if self.trained and length > self.trained and not self._warned:
            logger.warning(
                f"`ref_model` was made for at most {self.trained} positions and a text has {length} tokens: what it "
                f"says of the later ones may mean little. Set `max_length={self.trained}` to leave them out."
            )
            self._warned = True
