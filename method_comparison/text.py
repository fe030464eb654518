"""The alphabet: one token per character."""

import functools
import string

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


ALPHABET = string.digits + string.ascii_lowercase + "+-*%=,>;<#?"
PAD, END = "<pad>", "<eos>"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with padding and an end-of-sequence token."""
    vocabulary = {token: number for number, token in enumerate([PAD, END, *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, eos_token=END)


def as_dataset(pairs: list[tuple[str, str]]) -> Dataset:
    """Prompt-completion pairs as the trainer's own preparation would make them: tokens, and what is completion."""
    vocabulary = tokenizer().get_vocab()
    rows: dict[str, list] = {"input_ids": [], "completion_mask": []}
    for prompt, completion in pairs:
        rows["input_ids"].append([vocabulary[character] for character in prompt + completion] + [vocabulary[END]])
        rows["completion_mask"].append([0] * len(prompt) + [1] * (len(completion) + 1))
    return Dataset.from_dict(rows)
