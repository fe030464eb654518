"""Random objectives in bf16, fp16 and fp32 against the dense specification in float64, on a GPU where there is one.

The error of the fused loss is at most that of the dense loss in the same dtype on the same device. On a GPU products
have float32 results and the Triton kernels are compiled; on a CPU some run in Triton's interpreter.
`FUZZ_SECONDS=600 FUZZ_SEED=7 pytest -s -m slow tests/loss/test_fuzz_rounded.py` tries more, and others.
"""

import dataclasses
import importlib.util
import random

import pytest
import torch
from problems import make_problem
from rounding import HALF, NAMES, arguments_of, assert_no_worse, dense, fused, results
from test_fuzz import drawn, fuzz
from test_precision import EPS

from trl_qtarget import QTargetConfig


pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = importlib.util.find_spec("triton") is not None and DEVICE == "cpu"


def moved(values: dict) -> dict:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def check(seed: int) -> None:
    draw = random.Random(seed)
    _, design, knobs = drawn(draw)
    shape = (draw.randint(20, 61), draw.choice([37, 64, 203, 208, 1000]), draw.randint(4, 32), seed)
    kernel = "triton" if INTERPRETER and draw.random() < 0.1 else "auto"
    config = QTargetConfig(**design, **knobs, chunk_tokens=draw.choice([None, 7, 24]), kernel=kernel)
    if config.open_knobs:
        return
    for dtype in (torch.float32, *HALF):
        problem = make_problem(*shape)
        values = arguments_of(problem, dtype, 0.5)
        # A head without transforms: `dense` has none.
        truth = results(dense, problem, config, {name: value.double() for name, value in values.items()})
        there = dataclasses.replace(problem, **moved(vars(problem)))
        fast, plain = (
            {name: value.cpu() for name, value in results(way, there, config, moved(values)).items()}
            for way in (fused, dense)
        )
        try:
            assert_no_worse(fast, plain, truth, dict.fromkeys(NAMES, dtype), slack=SLACK)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {design} {knobs}, {shape}, {dtype}, {kernel}: {error}") from None


# A float32 log-probability is a difference of numbers as large as the logits, here some ten; a power, a ratio or an
# exponential of one multiplies its error, and dense and fused round in another order.
SLACK = 32 * EPS


def test_random_objectives_are_no_worse_than_the_specification():
    print(f"{fuzz(check, 20)} on {DEVICE}")  # noqa: T201
