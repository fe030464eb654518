"""Quiet runs of one thread: no progress bars, and of the libraries' logs only what a test asks for."""

import logging
import os

import torch


# Read when Triton is first imported, which other libraries do: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import datasets
import pytest
import transformers
from nodes import two_nodes


def pytest_configure(config):
    # Tiny models gain nothing from threads, and workers of pytest-xdist would fight over the cores.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Of transformers about an option that TRL's SFTConfig still has under this name.
    config.addinivalue_line("filterwarnings", "ignore:`gradient_checkpointing` is deprecated:FutureWarning")
    for name in ("trl", "accelerate", "bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture
def logged(caplog):
    """Messages that the package logs during a test."""
    caplog.set_level(logging.INFO, logger="trl_qtarget")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_qtarget")]


@pytest.fixture
def nodes():
    """Two nodes, in networks of their own where this machine allows it."""
    with two_nodes() as made:
        yield made
