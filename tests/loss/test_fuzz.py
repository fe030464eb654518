"""Random losses against their formulas in float64, dense and fused, by seeds that a failure names.

`FUZZ_SECONDS=600 FUZZ_SEED=7 pytest -m slow tests/loss/test_fuzz.py` tries more, and others.
"""

import os
import random
import time
from collections.abc import Callable

import pytest
import torch
from designs import RESIDUAL_FORMULAS, TRUST_FORMULAS, free_formula
from formulas import FORMULAS
from problems import HEADS, make_problem, relative_error
from torch import Tensor

from trl_qtarget import METHODS, QTargetConfig, linear_qtarget_loss, qtarget_loss
from trl_qtarget.target.objective import designs_of, knobs_of
from trl_qtarget.target.registry import Range


pytestmark = pytest.mark.slow

# Where a formula, written as it is published, keeps its digits: no power of a number near 0, no exp beyond a float.
KNOBS = {
    "eta": (0.02, 0.98),
    "alpha": (1.0, 3.0),
    "tau": (0.0, 1.0),
    "lam": (0.0, 1.0),
    "beta": (0.3, 3.0),
    "temperature": (0.5, 2.0),
    "epsilon": (0.01, 3.0),
    "clip_max": (0.5, 20.0),
}


# The formulas' own rounding: small values are differences of large numbers, so the error is relative to 1 at least.
TOLERANCE = 1e-11


def knob(draw: random.Random, name: str, allowed: Range) -> float:
    if name == "top_k":
        return draw.randint(2, 40)
    low, high = KNOBS[name]
    return draw.uniform(max(low, allowed.low + 0.02), min(high, allowed.high - 0.02))


def drawn(draw: random.Random) -> tuple[Callable[..., Tensor], dict, dict]:
    """A formula, the arguments that name the same design, and some knobs."""
    if draw.random() < 0.5:
        name = draw.choice(list(FORMULAS))
        formula, design = FORMULAS[name], {"method": name}
    else:
        trust, residual = draw.choice(list(TRUST_FORMULAS)), draw.choice(list(RESIDUAL_FORMULAS))
        formula, design = free_formula(trust, residual), {"method": None, "trust": trust, "residual": residual}
    row = METHODS.get(design["method"])
    used = knobs_of(row, designs_of(row, design.get("trust"), design.get("residual")))
    return formula, design, {name: knob(draw, name, used[name].range) for name in sorted(used) if draw.random() < 0.7}


def check(seed: int) -> None:
    draw = random.Random(seed)
    formula, design, knobs = drawn(draw)
    row = METHODS.get(design["method"])
    given = knobs if row else {**QTargetConfig(**design, **knobs).knobs}  # one that both designs have is one number
    vocabulary = draw.choice([2, 3, 37, 64, draw.randint(2, 300)])
    shape = (draw.randint(1, 24), vocabulary, draw.randint(2, 9), seed)
    problem = make_problem(*shape, bias=draw.random() < 0.7, head=draw.choice(list(HEADS)))
    small = shape[0] * vocabulary < 2500
    kernel = "triton" if small and draw.random() < 0.1 else "torch"
    config = QTargetConfig(**design, **knobs, chunk_tokens=draw.choice([None, 1, 3]), kernel=kernel)
    case = f"seed {seed}: {design} {knobs}, {shape}, {problem.head}, {kernel}"

    leaves = problem.leaves()
    published = problem.per_token(formula, problem.logits(*leaves), **given)
    truth = torch.autograd.grad(published.sum() / problem.scored.sum().clamp(min=1), leaves)
    dense = qtarget_loss(problem.logits(), problem.labels, config, reduction="none", **problem.dense_arguments())
    assert relative_error(dense, published, 1.0) < TOLERANCE, case
    leaves = problem.leaves()
    hidden, weight, *bias = leaves
    fused = linear_qtarget_loss(
        hidden, weight, problem.labels, config, bias=bias[0] if bias else None, **problem.linear_arguments()
    )
    assert relative_error(fused.token_loss, published, 1.0) < TOLERANCE, case
    for found, true in zip(torch.autograd.grad(fused.loss, leaves), truth, strict=True):
        assert relative_error(found, true, 1.0) < TOLERANCE, case


def fuzz(check: Callable[[int], None], seconds: float) -> str:
    """Check seed after seed until the time is over, `FUZZ_SECONDS` or so many; says which they were."""
    first = int(os.environ.get("FUZZ_SEED", "0")) * 10**6
    end, seed = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", seconds)), first
    while time.monotonic() < end:
        check(seed)
        seed += 1
    assert seed > first
    return f"seeds {first} to {seed - 1}"


def test_random_losses_are_their_formulas():
    print(fuzz(check, 60))  # noqa: T201
