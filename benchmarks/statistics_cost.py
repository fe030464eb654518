"""What the logged statistics cost a training step: the same trainer with and without them, step by step in turns.

Without them the loss computes no more than its value and gradient, and nothing is gathered or summed for the log.

    python -m benchmarks.statistics_cost
    python -m benchmarks.statistics_cost --model tiny --batch 2 --tokens 16 --repeats 4 --output /tmp/statistics.csv
"""

import statistics
import tempfile
import time
from typing import Any

from datasets import disable_progress_bars
from transformers import TrainerCallback

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.chunks import Batch

from .budget import Budget
from .common import base_parser, finish_arguments, summary, write_results
from .models import MODELS
from .step import StepTimer, build


CASES = (("full", "qtarget/dft"), ("lora", "qtarget/dft"), ("lora", "qtarget/target_sft"))


def _only_the_loss(self: Batch, found: dict[str, Any], block: slice, target: Any) -> None:
    found["token_loss"][block] = self.objective.value(target)


class Turns(TrainerCallback):
    """Switches the statistics off in every other step."""

    def __init__(self):
        self.whole = (Batch._record, QTargetSFTTrainer._record)

    def on_step_begin(self, args, state, control, **kwargs):
        bare = state.global_step % 2 == 1
        Batch._record = _only_the_loss if bare else self.whole[0]
        QTargetSFTTrainer._record = (lambda *arguments: None) if bare else self.whole[1]

    def on_train_end(self, args, state, control, **kwargs):
        Batch._record, QTargetSFTTrainer._record = self.whole


class Limit(TrainerCallback):
    """Ends a training after so many seconds, but not before every kind of step has counted once."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 4 and state.global_step % 2 == 0 and time.perf_counter() > self.end:
            control.should_training_stop = True


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=20)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2-135m", help="sizes of the model")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sequence")
    arguments = finish_arguments(parser.parse_args(argv), "statistics")
    arguments.gradient_checkpointing = False
    arguments.steps = 2 * (arguments.repeats + 1)
    disable_progress_bars()
    sizes = MODELS[arguments.model]
    budget = Budget(arguments.budget, len(CASES))
    for mode, name in CASES:
        limit = budget.share(f"{mode} {name}")
        if limit == 0:
            continue
        with tempfile.TemporaryDirectory() as directory:
            trainer, timer = build(name, mode, directory, arguments)
            # Before the timer's own callback, so that the switch is not timed.
            trainer.pop_callback(StepTimer)
            trainer.add_callback(Turns())
            trainer.add_callback(timer)
            trainer.add_callback(Limit(limit))
            trainer.train()
        times = timer.times[2:]  # the first of each kind finds cold caches
        with_them, without = times[0::2], times[1::2]
        # Each step beside its neighbour, which met the same spell of the machine.
        cost = statistics.median(one / other for one, other in zip(with_them, without, strict=True))
        print(f"{mode} {name}: {cost:.3f} of the step without statistics, {len(without)} pairs")
        fixed = {"benchmark": "statistics", "mode": mode, "N": arguments.batch * arguments.tokens, "metric": "seconds"}
        fixed |= {"H": sizes["hidden_size"], "V": sizes["vocab_size"], "dtype": arguments.dtype}
        rows = [
            {**fixed, "provider": name, **summary(with_them), "floor_ratio": cost},
            {**fixed, "provider": f"{name} without statistics", **summary(without)},
        ]
        write_results(arguments.output, rows, arguments.device)
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
