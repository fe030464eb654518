"""Tiny models whose logits are more than their output embeddings times what the backbone ends with."""

from collections.abc import Callable

import tiny
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


def sizes(**overrides) -> dict:
    return {**tiny._sizes(), "bos_token_id": 1, "initializer_range": 0.3, "hidden_size": 16, **overrides}


def _decoder(name: str, **more) -> PreTrainedModel:
    """Of the family of BERT, without dropout, whose masks two losses would draw one after the other."""
    given = sizes(is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more)
    config = getattr(transformers, f"{name}Config")(**given)
    model = getattr(transformers, {"Bert": "BertLMHeadModel"}.get(name, f"{name}ForCausalLM"))(config)
    for part, value in model.named_parameters():
        value.requires_grad_(not part.endswith("key.bias"))  # shifts every score alike, so its gradient is rounding
    return model


def modernbert() -> PreTrainedModel:
    """A dense layer and a norm between the backbone and the head."""
    return _decoder("ModernBertDecoder", cls_token_id=1, sep_token_id=1)


def recurrent_gemma() -> PreTrainedModel:
    """A soft-cap by another name."""
    config = transformers.RecurrentGemmaConfig(
        **sizes(num_hidden_layers=3, lru_width=16, attention_window_size=64, logits_soft_cap=3.0)
    )
    model = transformers.RecurrentGemmaForCausalLM(config)
    model.lm_head.weight.data.normal_(0, 0.5)
    return model


def inkling() -> PreTrainedModel:
    """A scale before the head, and a vocabulary smaller than its rows."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    more = {"layer_types": None, "mlp_layer_types": None, "unpadded_vocab_size": len(tiny.tokenizer()) - 5}
    return transformers.InklingForCausalLM(transformers.InklingTextConfig(**sizes(**experts, **more)))


def llava_over_cohere() -> PreTrainedModel:
    """The configuration of its text has a scale that the class does not apply."""
    text = {name: value for name, value in sizes(logit_scale=0.25).items() if name != "attn_implementation"}
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        text_config=transformers.CohereConfig(**text),
        vision_config=transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=32, projection_dim=16, **vision),
        image_token_index=len(tiny.tokenizer()) - 1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.get_output_embeddings().weight.data.normal_(0, 1)
    for name, value in model.named_parameters():
        value.requires_grad_("vision" not in name and "projector" not in name)
    return model


class OwnForward(LlamaForCausalLM):
    """A Llama whose class does something of its own around the head."""

    def before(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def after(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.after(self.lm_head(self.before(hidden))))


class ScaledInCode(OwnForward):
    def before(self, hidden):
        return hidden / 7


class ScaledAfterInCode(OwnForward):
    def after(self, logits):
        return logits.float() / 3


class CappedInCode(OwnForward):
    """The cap comes first, so both numbers are the cap's."""

    def after(self, logits):
        return 0.6 * (2.5 * torch.tanh(logits / 2.5))


class OtherTemperatures(OwnForward):
    """Every token of the vocabulary has a temperature of its own, which no scale is."""

    def after(self, logits):
        return logits * torch.linspace(1, 2, logits.size(-1))


class Squared(OwnForward):
    def after(self, logits):
        return logits + 1e-4 * logits.square()


class TwoCalls(OwnForward):
    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        halves = hidden.split((hidden.size(1) + 1) // 2, 1)
        return CausalLMOutputWithPast(logits=torch.cat([self.lm_head(half) for half in halves], 1))


class WithoutItsModule(OwnForward):
    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


class _NormedHead(nn.Linear):
    """Multiplies with rows of length one, as Baichuan 2 does."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


def normed_head() -> PreTrainedModel:
    model = tiny.model()
    weight = model.lm_head.weight
    model.lm_head = _NormedHead(weight.size(1), weight.size(0), bias=False)
    return model


class _ScaledHead(nn.Linear):
    """With a factor for every token, one at first, as Dory has it."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.factor = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, hidden):
        return super().forward(hidden) * self.factor


def scaled_head() -> PreTrainedModel:
    model = tiny.model()
    model.lm_head = _ScaledHead(*reversed(model.lm_head.weight.shape))
    return model


class TrainedScale(OwnForward):
    def __init__(self, config):
        super().__init__(config)
        self.factor = nn.Parameter(torch.ones(()))

    def after(self, logits):
        return logits * self.factor


def of(cls: type[LlamaForCausalLM]) -> Callable[[], PreTrainedModel]:
    return lambda: cls(transformers.LlamaConfig(**sizes()))


FITTING = {
    "modernbert": modernbert,
    "bert": lambda: _decoder("Bert"),
    "roberta": lambda: _decoder("Roberta"),
    "recurrent_gemma": recurrent_gemma,
    "inkling": inkling,
    "llava_over_cohere": llava_over_cohere,
    "scaled_in_code": of(ScaledInCode),
    "scaled_after_in_code": of(ScaledAfterInCode),
    "capped_in_code": of(CappedInCode),
}

UNFIT = {
    "temperatures": (of(OtherTemperatures), "no scale and no soft-cap"),
    "squared": (of(Squared), "no scale and no soft-cap"),
    "two_calls": (of(TwoCalls), "called 2 times"),
    "without_its_module": (of(WithoutItsModule), "called 0 times"),
    "normed": (normed_head, "does more than multiply with its weight"),
}


# Policies whose loss would be right at first, and which would not be trained whole.
TRAINED = {"head": scaled_head, "after_the_head": of(TrainedScale)}


def build(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return make().eval()
