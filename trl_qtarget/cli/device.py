"""Without an accelerator, training and inspection run on the CPU."""

import os
from collections.abc import Container

import torch


# A recipe for a GPU would be refused for some of these.
ON_CPU = {"use_cpu": "True", "bf16": "False", "fp16": "False", "tf32": "False"}


def cpu_words(given: Container[str]) -> list[str]:
    """Arguments that make a training run on the CPU where there is nothing else; none where there is, or it was said.

    Args:
        given: names of the arguments that the user has set.
    """
    if torch.accelerator.is_available() or "use_cpu" in given:
        return []
    return [word for name, value in ON_CPU.items() for word in (f"--{name}", value)]


def threads_each(processes: int) -> int | None:
    """Threads for each of some processes on the CPU, so that all cores work; None where the user has said it."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, torch.get_num_threads() // processes)
