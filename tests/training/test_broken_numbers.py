"""A NaN of a real token is seen in the log; only what does not exist is left out."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from training import train_target, warm_model

from trl_qtarget import QTargetConfig


NAMES = ("nll", "trust", "label_mass", "kl")


def broken(model, token: int = 300):
    """A model whose last layer says nothing but NaN after one token."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    return model


def with_token(token: int = 300):
    """One of the four rows has the token near its end, so most labels are scored as ever."""
    rows = tiny.tokenizer()(tiny.sentences(4, seed=1))["input_ids"]
    assert not any(token in row for row in rows)
    return Dataset.from_dict({"input_ids": [rows[0] + [token, 7], *rows[1:]]})


def line_of(method, **arguments) -> dict[str, float]:
    run = train_target(method, with_token(), steps=1, options={"max_grad_norm": 0.0}, **arguments)
    return run.steps[0]


@pytest.mark.parametrize("method", ["sft", "dft", "label_smoothing", "gem", "target_sft"])
def test_broken_policy_shows_in_every_number(method):
    line = line_of(method, model=broken(warm_model()))
    # What does not look at the policy is a number whatever that says.
    independent = {"sft": {"trust"}, "gem": {"trust"}, "label_smoothing": {"trust", "label_mass"}}.get(method, set())
    for name in set(NAMES) - independent:
        assert math.isnan(line[f"target/{name}"]), name
    assert all(math.isfinite(line[f"target/{name}"]) for name in independent)
    assert "target/prior_agreement" not in line or not math.isnan(line["target/prior_agreement"])


@pytest.mark.parametrize(
    ("method", "seen"),
    [("asft", {"label_mass", "kl"}), ("target_sft", {"label_mass", "kl"}), ("iw_sft", {"trust", "label_mass", "kl"})],
)
def test_broken_prior_shows_where_it_is_read(method, seen):
    line = line_of(method, ref_model=broken(warm_model(steps=12)))
    for name in NAMES:
        assert math.isnan(line[f"target/{name}"]) == (name in seen), name
    assert math.isfinite(line["target/prior_agreement"])


def test_what_does_not_exist_is_left_out():
    line = line_of("gem")
    assert "target/kl" not in line and "target/prior_agreement" not in line
    assert all(math.isfinite(line[f"target/{name}"]) for name in ("nll", "trust", "label_mass"))
    half = line_of(QTargetConfig(method=None, trust="importance", residual="prior"), ref_model=warm_model(steps=12))
    assert math.isfinite(half["target/kl"])  # of the documents whose trust is at most 1


def test_evaluation_is_no_exception():
    run = train_target(
        "sft", model=broken(warm_model()), steps=1, eval_dataset=with_token(), options={"eval_strategy": "steps"}
    )
    assert all(math.isnan(line["eval_target/nll"]) for line in run.evaluations)
