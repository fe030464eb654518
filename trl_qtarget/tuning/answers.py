"""Answers of a model and their judges: what Average@k and greedy accuracy are made of."""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .functions import find_function


Judge = Callable[[str, str], bool]


def final_answer(text: str, like: str) -> str:
    """The last number of a text where `like` ends in a number, else its last line."""
    if re.search(r"\d$", like.strip()):
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return numbers[-1].replace(",", "") if numbers else ""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def judge_exact(answer: str, text: str) -> bool:
    """Both end in the same answer: the last number if the right one ends in a number, else the last line."""
    return final_answer(text, answer) == final_answer(answer, answer)


def judge_letter(answer: str, text: str) -> bool:
    """The letter of a choice: a boxed one, one after "answer is", else the last single capital letter."""
    for pattern in (r"\\boxed\{\(?([A-Z])\)?\}", r"answer is:?\s*\(?([A-Z])\b", r"\b([A-Z])\b"):
        if found := re.findall(pattern, text):
            return found[-1] == answer.strip("() .").upper()
    return False


def judge_math(answer: str, text: str) -> bool:
    """Mathematically equal, as math-verify sees it."""
    from math_verify import parse, verify

    return verify(parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$"), parse(text))


def judge_text(answer: str, text: str) -> bool:
    """The last line, word for word."""
    lines = text.strip().splitlines()
    return bool(lines) and lines[-1].strip() == answer.strip()


JUDGES: dict[str, Judge] = {"exact": judge_exact, "letter": judge_letter, "math": judge_math, "text": judge_text}


def find_judge(name: str) -> Judge:
    """A judge `(right answer, generated text) -> bool` by its name, or `module:function`.

    Raises:
        ValueError: there is none, or it needs a package that is not installed.
    """
    if ":" in name:
        return find_function(name, "judge")
    if name not in JUDGES:
        raise ValueError(f"`judge={name!r}` is unknown: choose one of {', '.join(JUDGES)}, or `module:function`.")
    if name == "math" and find_spec("math_verify") is None:
        raise ValueError("`judge='math'` needs math-verify: pip install math-verify, or choose another judge.")
    return JUDGES[name]


def prompt_text(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """A prompt as the model reads it, and whether the tokenizer adds its special tokens to it.

    Raises:
        ValueError: messages, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt, True
    if tokenizer.chat_template is None:
        raise ValueError("`metric`: the prompts are messages and the tokenizer has no chat template: give it one.")
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), False


@torch.inference_mode()
def shares_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    answers: Sequence[str],
    judge: Judge,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[float]:
    """The share of right answers to each prompt.

    Args:
        prompts: texts, or messages.
        answers: the right answers.
        judge: `(right answer, generated text) -> bool`.
        samples: answers to each prompt; one where `temperature` is 0.
        temperature: of the sampling, which is plain: no top-k, no nucleus. 0 is greedy.
        max_new_tokens: the longest answer, in tokens.
        batch_size: answers at a time.
        seed: every model gets the same random numbers.
    """
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    samples = samples if temperature else 1
    step = max(1, batch_size // samples)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    shares = []
    for start in range(0, len(prompts), step):
        # A seed per batch: answers do not depend on where an evaluation began. The trainer's own are left alone.
        torch.manual_seed(seed + start)
        texts, special = zip(
            *(prompt_text(prompt, tokenizer) for prompt in prompts[start : start + step]), strict=True
        )
        inputs = tokenizer(
            list(texts),
            padding=True,
            padding_side="left",
            add_special_tokens=special[0],
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(
            **inputs, **sampling, num_return_sequences=samples, max_new_tokens=max_new_tokens, pad_token_id=pad
        )
        written = tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        for number, answer in enumerate(answers[start : start + step]):
            mine = written[number * samples : (number + 1) * samples]
            shares.append(sum(bool(judge(answer, text)) for text in mine) / samples)
    return shares
