"""Tiny vision-language models with processors made in process, and datasets whose pictures are drawn here."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import tiny
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)


_IMAGE, _START, _END, _VIDEO = "<image>", "<start_of_image>", "<end_of_image>", "<video>"
_SIDE = 16  # pixels
# A bias of the keys shifts every score alike, so its gradient is rounding; LLaVA does not read the last norm of its
# tower, which has none. Both are frozen.
_IDLE = ("k_proj.bias", "post_layernorm")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE_HERE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokens = {"image_token": _IMAGE, "boi_token": _START, "eoi_token": _END, "video_token": _VIDEO}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=tokens,
    )


def _text(**more) -> dict:
    """Sizes of the language model."""
    sizes = tiny._sizes(initializer_range=0.2, vocab_size=len(_tokenizer()), **more)
    return {name: value for name, value in sizes.items() if name != "attn_implementation"}


def _ids(**names: str) -> dict[str, int]:
    return {name: _tokenizer().convert_tokens_to_ids(token) for name, token in names.items()}


def _vision(**more) -> dict:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"image_size": _SIDE, "patch_size": 4, "initializer_range": 0.2} | more


def _llava() -> PreTrainedModel:
    """Pixels of one size; as many image tokens as patches."""
    config = LlavaConfig(
        text_config=LlamaConfig(**_text()),
        vision_config=CLIPVisionConfig(**_vision(), projection_dim=16),
        vision_feature_layer=-1,
        **_ids(image_token_id=_IMAGE),
    )
    return LlavaForConditionalGeneration(config)


def _llava_processor() -> ProcessorMixin:
    size = {"height": _SIDE, "width": _SIDE}
    pictures = CLIPImageProcessor(size={"shortest_edge": _SIDE}, crop_size=size)
    return LlavaProcessor(
        pictures,
        _tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE_HERE", _IMAGE),
    )


def _gemma3() -> PreTrainedModel:
    """`token_type_ids`: the tokens of an image attend to each other both ways. The head is the embeddings."""
    layers = ["sliding_attention", "full_attention"]
    text = {"head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 4, "layer_types": layers}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_text(**text)),
        vision_config=SiglipVisionConfig(**_vision(vision_use_head=False)),
        mm_tokens_per_image=4,
        **_ids(image_token_id=_IMAGE, boi_token_id=_START, eoi_token_id=_END),
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3_processor() -> ProcessorMixin:
    pictures = Gemma3ImageProcessor(size={"height": _SIDE, "width": _SIDE})
    template = CHAT_TEMPLATE.replace("IMAGE_HERE", _START)
    return Gemma3Processor(pictures, _tokenizer(), chat_template=template, image_seq_length=4)


def _qwen(vision: dict) -> dict:
    """`image_grid_thw` and `mm_token_type_ids`: pictures of any size, positions in three dimensions."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10_000.0}
    return {
        "text_config": _text(bos_token_id=None, head_dim=4) | {"rope_parameters": rope},
        "vision_config": {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1} | vision,
        **_ids(image_token_id=_IMAGE, video_token_id=_VIDEO, vision_start_token_id=_START, vision_end_token_id=_END),
    }


def _qwen2_5() -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 16}
    config = _qwen(vision | {"window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.2})
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


def _qwen3_moe() -> PreTrainedModel:
    """A mixture of four experts, two active, that sees."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 16}
    config = _qwen(vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16})
    config["text_config"] |= {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.05,
    }
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))


class _PicturesOnly(Qwen2_5_VLProcessor):
    """Without a processor of videos, which would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen_processor() -> ProcessorMixin:
    pictures = Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=1, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    template = CHAT_TEMPLATE.replace("IMAGE_HERE", _START + _IMAGE + _END)
    return _PicturesOnly(pictures, _tokenizer(), chat_template=template)


@dataclass(frozen=True)
class Family:
    """How to make an architecture and its processor."""

    make: Callable[[], PreTrainedModel]
    processor: Callable[[], ProcessorMixin]

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = self.make()
        model.set_attn_implementation("eager")
        for name, value in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # starts at zero, and nothing would be seen
                torch.nn.init.normal_(value, std=0.2)
            value.requires_grad_(not any(part in name for part in _IDLE))
        return model.eval()


FAMILIES = {
    "llava": Family(_llava, _llava_processor),
    "gemma3": Family(_gemma3, _gemma3_processor),
    "qwen2_5_vl": Family(_qwen2_5, _qwen_processor),
    "qwen3_vl_moe": Family(_qwen3_moe, _qwen_processor),
}


def picture(seed: int) -> Pillow.Image:
    """Noise."""
    return Pillow.frombytes("RGB", (_SIDE, _SIDE), random.Random(seed).randbytes(3 * _SIDE * _SIDE))


def _dataset(columns: dict, **features) -> Dataset:
    pictures = [[picture(number)] for number in range(len(next(iter(columns.values()))))]
    return Dataset.from_dict(columns | {"images": pictures}, features=Features(**features, images=Sequence(Image())))


_TURNS = [{"role": Value("string"), "content": Value("string")}]


def _turns(role: str, texts: list[str]) -> list:
    return [[{"role": role, "content": text}] for text in texts]


def chat_dataset(count: int = 8, seed: int = 1) -> Dataset:
    """Conversational: TRL puts the picture into the user's turn."""
    questions, answers = _turns("user", tiny.sentences(count, seed, 4)), _turns("assistant", tiny.sentences(count, 9))
    messages = [question + answer for question, answer in zip(questions, answers, strict=True)]
    return _dataset({"messages": messages}, messages=_TURNS)


def prompt_dataset(count: int = 8, seed: int = 1) -> Dataset:
    """Conversational prompt-completion, with the picture in the prompt: loss on the completion only."""
    prompts, answers = _turns("user", tiny.sentences(count, seed, 4)), _turns("assistant", tiny.sentences(count, 9))
    return _dataset({"prompt": prompts, "completion": answers}, prompt=_TURNS, completion=_TURNS)
