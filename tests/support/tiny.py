"""Tiny random models, a tokenizer trained in process, small datasets: what tests train on, without a network."""

import copy
import functools
import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = "the model learns a target from noisy labels and trusts what it already knows about each token".split()


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Random sentences of two to `longest` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(2, longest))) for _ in range(count)]


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template that marks assistant turns."""
    return copy.deepcopy(_tokenizer())


def _sizes(**overrides):
    sizes = {
        "vocab_size": len(_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
    }
    return sizes | overrides


def model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A Llama of about 15k parameters in float32; weights large enough that its predictions are not all alike."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_sizes(initializer_range=0.2, **overrides)))


def moe_model(seed: int = 0) -> Qwen3MoeForCausalLM:
    """A mixture of four experts, two active."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **_sizes(
            initializer_range=0.2,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=4,
            router_aux_loss_coef=0.05,
            output_router_logits=True,
        )
    )
    return Qwen3MoeForCausalLM(config)


def text_dataset(count: int = 24, seed: int = 1) -> Dataset:
    """Language modelling: a `text` column."""
    return Dataset.from_dict({"text": sentences(count, seed)})


def prompt_dataset(count: int = 24, seed: int = 1) -> Dataset:
    """Prompt-completion: loss on the completion only."""
    return Dataset.from_dict(
        {"prompt": sentences(count, seed, 6), "completion": [" " + text for text in sentences(count, seed + 1)]}
    )


def chat_dataset(count: int = 24, seed: int = 1) -> Dataset:
    """Conversational: `messages`."""
    pairs = zip(sentences(count, seed, 6), sentences(count, seed + 1), strict=True)
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                for question, answer in pairs
            ]
        }
    )
