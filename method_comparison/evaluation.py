"""What a model can do: sampled and greedy answers, judged per prompt; NLL and entropy on right solutions."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .tasks import Problem
from .text import tokenizer


GREEDY = 0.0


@torch.inference_mode()
def solved_counts(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    temperature: float,
    samples: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 1024,
) -> list[int]:
    """How many of `samples` answers to each problem are right; one greedy answer at temperature 0.

    Sampling is plain: no top-k, no nucleus. The same seed gives every model the same random numbers.
    """
    model.eval()
    texts = tokenizer()
    sampling = {"do_sample": False}
    if temperature == GREEDY:
        samples = 1
    else:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        sampling["num_return_sequences"] = samples
    torch.manual_seed(seed)
    counts = []
    step = max(1, batch_size // samples)
    for start in range(0, len(problems), step):
        batch = problems[start : start + step]
        inputs = texts(
            [problem.prompt for problem in batch],
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        answers = texts.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        for number, problem in enumerate(batch):
            mine = answers[number * samples : (number + 1) * samples]
            counts.append(sum(map(problem.solved_by, mine)))
    return counts


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
