"""The real model, its adapter, and solutions as it reads them; for `--quick` a tiny one with random weights."""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..settings import HERE, Study
from ..tasks import Problem
from .tasks import messages


TINY = "tiny"
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}|{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def prepare(study: Study, directory: Path) -> None:
    """Put the study's model into a folder, if it is not there yet."""
    if (directory / study.model["name"]).is_dir():
        return
    if study.model["name"] == TINY:
        _save_tiny(study.model[TINY], directory / TINY)
        return
    # The demo knows how the packaged model becomes a plain checkpoint.
    sys.path.insert(0, str(HERE.parent / "examples"))
    from demo_model import packaged_model

    packaged_model(directory)


def _save_tiny(sizes: dict[str, Any], folder: Path) -> None:
    """A Llama that reads bytes, as its tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({token: number for number, token in enumerate(["<end>", *alphabet])}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    texts = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>")
    texts.chat_template = _TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(texts), eos_token_id=0, pad_token_id=0, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    texts.save_pretrained(folder)


@functools.cache
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model in a folder."""
    return AutoTokenizer.from_pretrained(folder)


def load(folder: Path, dtype: str) -> PreTrainedModel:
    """The model as it is before training."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapter(study: Study) -> LoraConfig:
    """The adapter that is trained."""
    return LoraConfig(task_type="CAUSAL_LM", **study.model["lora"])


def as_dataset(pairs: list[tuple[Problem, str]], texts: PreTrainedTokenizerBase) -> Dataset:
    """Problems with solutions as tokens, and what of them is completion: the solution and the end of the turn.

    A prompt is tokenized alone, as it is when the model answers it.
    """
    rows: dict[str, list] = {"input_ids": [], "completion_mask": []}
    for problem, solution in pairs:
        asked = texts.apply_chat_template(messages(problem), tokenize=False, add_generation_prompt=True)
        prompt = texts(asked, add_special_tokens=False)["input_ids"]
        answer = [*texts(solution, add_special_tokens=False)["input_ids"], texts.eos_token_id]
        rows["input_ids"].append(prompt + answer)
        rows["completion_mask"].append([0] * len(prompt) + [1] * len(answer))
    return Dataset.from_dict(rows)
