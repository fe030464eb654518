"""Whether a model can be the reference of a policy: refusals, before anything is changed."""

from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from accelerate.utils.other import is_compiled_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from .base import base_model_of


logger = get_logger(__name__)


# Of PEFT's, by what they do to a forward pass that has the loss in the place of the logits.
_UNFIT_ADAPTERS = {
    "XLORA": "runs the model a first time to mix its adapters, and looks for that pass's hidden states",
    "ADAPTION_PROMPT": "puts the layers that it changes into another model than the one that is run",
}


def check_kind(name: str, model: Any) -> None:
    """Raise unless a loaded model is a decoder with an LM head, perhaps under PEFT; `name` is the argument's."""
    for adapter in model.peft_config.values() if is_peft_model(model) else ():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind in _UNFIT_ADAPTERS:
            raise ValueError(
                f"`{name}` has an adapter of the kind {kind}, which {_UNFIT_ADAPTERS[kind]}: use another kind."
            )
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
    place = value.untyped_storage().data_ptr() if type(value.data) is Tensor else 0
    return place or id(value)


def _first_position(table: nn.Embedding) -> int:
    """Some classes count from an offset on, and RoBERTa's from behind the index of padding."""
    return getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1


class Positions:
    """How long a row a model can read.

    Args:
        model: the model.
        name: of the argument that gave it.
    """

    def __init__(self, model: PreTrainedModel, name: str):
        self.name = name
        trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.trained = trained if isinstance(trained, int) else None
        # A little longer where positions do not count from 0. Other tables are those of images.
        sizes = () if self.trained is None else range(self.trained, self.trained + 8)
        tables = [
            module.num_embeddings - _first_position(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            and ("position" in name or "wpe" in name)
            and "relat" not in name
            and module.num_embeddings in sizes
        ]
        self.learned = min(tables, default=None)
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
                f"`{self.name}` has {self.learned} positions and a text has {length} tokens: set `max_length` to at "
                f"most {self.learned}, or pass another model."
            )
        if self.trained and length > self.trained and not self._warned:
            logger.warning(
                f"`{self.name}` was made for at most {self.trained} positions and a text has {length} tokens: what it "
                f"says of the later ones may mean little. Set `max_length={self.trained}` to leave them out."
            )
            self._warned = True
