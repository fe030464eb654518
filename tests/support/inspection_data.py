"""Data of an inspection page, made without a model: random distributions, and targets computed from them."""

import math
import random
import re

from trl_qtarget.inspection.summary import summarise


FORMULAS = {"sft": "-log p_y", "dft": "-sg[p_y] log p_y", "target_sft": "CE(Q, p)", "gem": "CE(δ + p − q, p)"}
TEXT = (
    "Question: A farmer has 14 hens. Each lays 5 eggs a week, and he sells a dozen for $3. "
    "What does he earn in 6 weeks?\n\n"
    "Answer: The hens lay 14 * 5 = 70 eggs a week. In 6 weeks that is 70 * 6 = 420 eggs, so 420 / 12 = 35 dozen.\n"
    "He earns 35 * 3 = $105 in six weeks.\n\tThe answer is 105.\n"
)


def inspection_data(
    examples: int = 3,
    tokens: int = 120,
    methods: tuple[str, ...] = ("sft", "dft", "target_sft"),
    alternatives: int = 6,
    prompt: int | None = None,
    prior: bool = True,
    texts: list[str] | None = None,
    seed: int = 0,
) -> dict:
    """Random data that keep every promise of the schema.

    `texts` are the words of the vocabulary, in their order; a quarter of the tokens is prompt unless said otherwise.
    """
    draw = random.Random(seed)
    words = texts or _words(TEXT)
    scored = range(tokens // 4 if prompt is None else prompt, tokens)
    found = [_example(draw, number, words, scored, methods, alternatives, prior) for number in range(examples)]
    return {
        "title": "What is it being taught?",
        "model": "HuggingFaceTB/SmolLM2-135M",
        "dataset": "openai/gsm8k (train)",
        "reference": "HuggingFaceTB/SmolLM2-135M" if prior else None,
        "date": "2026-01-31",
        "versions": {"trl-qtarget": "0.1.0", "torch": "2.9.1", "trl": "1.16.0"},
        "vocabulary": {str(number): word for number, word in enumerate(words)},
        "methods": [
            {
                "name": name,
                "title": name,
                "formula": FORMULAS[name],
                "knobs": {"target_sft": {"eta": 0.5}, "gem": {"beta": 0.7}}.get(name, {}),
                "trained": None,
                "equals": None,
                "prior": "the base model" if prior and name == "target_sft" else None,
                "arxiv": {"dft": "2508.05629", "target_sft": "2606.11189", "gem": "2408.16673"}.get(name),
            }
            for name in methods
        ],
        "examples": found,
        "summary": summarise(found, len(methods)),
    }


def _words(text: str) -> list[str]:
    """Words with the space before them, and signs, like the pieces of a byte-level BPE."""
    return re.findall(r"[ \t]?\w+|[ ]?[^\w\s]|\s", text)


def _example(draw, number, words, scored, methods, alternatives, has_prior) -> dict:
    ids = [position % len(words) for position in range(scored.stop)]
    example = {"name": str(number), "tokens": ids, "scored": list(scored), "prior": [] if has_prior else None}
    example |= {name: [] for name in ("nll", "entropy", "alternatives", "p")}
    columns = ("trust", "scale", "kl", "label_mass", "drift", "q", "suspicion", "preferred")
    example["methods"] = [{name: [] for name in columns} for _ in methods]
    for position in scored:
        label = ids[position]
        others = [word for word in range(len(words)) if word != label]
        others = draw.sample(others, min(alternatives + 3, len(others)))
        support = [label, *others]
        wanted = draw.choice([5.0, 4.0, 3.0, 1.0, -1.0])
        logits = [wanted, *(draw.gauss(0, 1.5) for _ in others)]
        p = _softmax(logits)
        prior = _softmax([logit + draw.gauss(0, 1) for logit in logits])
        shown = [0, *sorted(range(1, len(p)), key=lambda k: -max(p[k], prior[k]))[: alternatives - 1]]
        example["nll"].append(_short(-math.log(p[0])))
        example["entropy"].append(_short(-sum(x * math.log(x) for x in p)))
        example["alternatives"].append([support[k] for k in shown])
        example["p"].append([_short(p[k]) for k in shown])
        if has_prior:
            example["prior"].append([_short(prior[k]) for k in shown])
        for name, columns in zip(methods, example["methods"], strict=True):
            trust, q = _target(name, p, prior, logits)
            columns["trust"].append(_short(trust))
            columns["scale"].append(1.0)
            columns["kl"].append(_divergence(q, p))
            columns["label_mass"].append(_short(q[0]))
            columns["drift"].append(_short(sum(x * (y - x) for x, y in zip(p, q, strict=True))))
            columns["q"].append([_short(q[k]) for k in shown])
            rival, preferred = max(zip(q[1:], others, strict=True))
            columns["preferred"].append(preferred)
            columns["suspicion"].append(_short(max(0.0, math.log(rival / q[0])) if min(rival, q[0]) > 0 else 0.0))
    return example


def _target(name: str, p: list[float], prior: list[float], logits: list[float]) -> tuple[float, list[float]]:
    trust = p[0] if name in ("dft", "target_sft") else 1.0
    residual = p
    if name == "target_sft":
        residual = _softmax([0.5 * math.log(x) + 0.5 * math.log(y) for x, y in zip(p, prior, strict=True)])
    q = [(1 - trust) * x for x in residual]
    if name == "gem":
        q = [x - y for x, y in zip(p, _softmax([logit / 0.7 for logit in logits]), strict=True)]
    return trust, [q[0] + trust, *q[1:]]


def _divergence(q: list[float], p: list[float]) -> float | None:
    """None for a signed target, which is no distribution."""
    if min(q) < 0:
        return None
    return _short(sum(y * math.log(y / x) for x, y in zip(p, q, strict=True) if y > 0))


def _softmax(logits: list[float]) -> list[float]:
    mass = [math.exp(logit) for logit in logits]
    return [x / sum(mass) for x in mass]


def _short(x: float) -> float:
    return float(f"{x:.5g}")
