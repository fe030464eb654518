"""What the logged statistics cost a training step: the time that is spent in them, beside that of the whole step.

Timed within the step, and not by the difference of steps with and without them: steps differ from each other by more
than that. The loss's own value, which a step needs anyway, is counted once too often, and so is what the gradient
would compute if the statistics had not; so the cost is an upper bound.

    python -m benchmarks.statistics_cost
    python -m benchmarks.statistics_cost --model tiny --batch 2 --tokens 16 --repeats 4 --output /tmp/statistics.csv
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.loss.chunks import Batch

from .budget import Budget
from .common import base_parser, finish_arguments, summary, write_results
from .models import MODELS
from .step import build


CASES = (("full", "qtarget/dft"), ("lora", "qtarget/dft"), ("lora", "qtarget/target_sft"))


class Watch(TrainerCallback):
    """Seconds that every step spends in the statistics; on CUDA those between events, so that nothing waits."""

    def __init__(self, cuda: bool):
        self.cuda, self.times = cuda, []
        self._spans: list[Any] = []
        self._whole = (Batch._record, QTargetSFTTrainer._record)

    @contextmanager
    def _span(self) -> Iterator[None]:
        if self.cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._spans.append(time.perf_counter() - begin)

    def on_train_begin(self, args, state, control, **kwargs):
        of_batch, of_trainer = self._whole

        def record_batch(batch: Batch, found: dict[str, Any], block: slice, target: Any) -> None:
            found["token_loss"][block] = batch.objective.value(target)  # what a step needs without statistics too
            with self._span():
                of_batch(batch, found, block, target)

        def record_step(trainer: QTargetSFTTrainer, *arguments: Any) -> None:
            with self._span():
                of_trainer(trainer, *arguments)

        Batch._record, QTargetSFTTrainer._record = record_batch, record_step

    def on_step_begin(self, args, state, control, **kwargs):
        self._spans.clear()

    def on_step_end(self, args, state, control, **kwargs):
        """After the timer's, which waits for the device."""
        spans = [begin.elapsed_time(end) / 1e3 for begin, end in self._spans] if self.cuda else self._spans
        self.times.append(sum(spans))

    def on_train_end(self, args, state, control, **kwargs):
        Batch._record, QTargetSFTTrainer._record = self._whole


class Limit(TrainerCallback):
    """Ends a training after so many seconds, but not before a step has counted."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 2 and time.perf_counter() > self.end:
            control.should_training_stop = True


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=20)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2-135m", help="sizes of the model")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sequence")
    parser.set_defaults(optim=None)  # of the step
    arguments = finish_arguments(parser.parse_args(argv), "statistics")
    arguments.gradient_checkpointing = False
    arguments.steps = arguments.repeats + 1
    disable_progress_bars()
    sizes = MODELS[arguments.model]
    budget = Budget(arguments.budget, len(CASES))
    for mode, name in CASES:
        limit = budget.share(f"{mode} {name}")
        if limit == 0:
            continue
        with tempfile.TemporaryDirectory() as directory:
            trainer, timer = build(name, mode, directory, arguments)
            watch = Watch(arguments.device == "cuda")
            trainer.add_callback(watch)
            trainer.add_callback(Limit(limit))
            trainer.train()
        times, spent = timer.times[1:], watch.times[1:]  # the first finds cold caches
        cost = statistics.median(step / (step - part) for step, part in zip(times, spent, strict=True))
        print(f"{mode} {name}: {cost:.4f} of the step without statistics, {len(times)} steps")
        fixed = {"benchmark": "statistics", "mode": mode, "N": arguments.batch * arguments.tokens, "metric": "seconds"}
        fixed |= {"H": sizes["hidden_size"], "V": sizes["vocab_size"], "dtype": arguments.dtype}
        rows = [
            {**fixed, "provider": name, **summary(times), "floor_ratio": cost},
            {**fixed, "provider": f"{name}, in its statistics", **summary(spent)},
        ]
        write_results(arguments.output, rows, arguments.device)
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
