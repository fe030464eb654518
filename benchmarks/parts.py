"""The parts of `python -m benchmarks`: which benchmark, with which sizes, and its share of the time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One benchmark: its module and file, its share of the time, and its arguments by device and when in a hurry."""

    module: str
    share: float
    cuda: str = ""
    cpu: str = ""
    quick: str = ""

    def arguments(self, device: str, quick: bool) -> list[str]:
        """Its command line, without device, budget and output."""
        return (self.quick if quick else getattr(self, device)).split()


# The shape of TRL's issue 7244: 8192 tokens, and the head of an 8B model with Qwen's vocabulary.
_CUDA_SHAPE = "--shapes 8192x4096x151936"
_EAGER = "--providers qtarget qtarget-torch trl dense liger cce cce-exact"
_TINY = "--shapes 256x64x1000 --providers qtarget trl dense --repeats 1"

PARTS = {
    "head": Part(
        "head",
        4,  # compiling takes most of it
        cuda=f"{_CUDA_SHAPE} --repeats 7",
        cpu="--providers qtarget trl dense --repeats 3",
        quick=_TINY,
    ),
    # Compiled functions are compiled anew for every shape: they are left to `head`.
    "memory": Part(
        "memory",
        2,
        cuda=f"{_CUDA_SHAPE} {_EAGER} --modes trainable frozen --repeats 1",
        cpu="--providers qtarget trl dense --repeats 1",
        quick="--shapes 256x64x1000 --providers qtarget/dft trl/dft --repeats 1",
    ),
    "sweep": Part(
        "sweep",
        3,
        cuda="--repeats 3",
        cpu="--repeats 2 --providers qtarget/dft qtarget/target_sft",  # TRL's take three times as long there
        quick="--base 256x32x1024 --N 256 512 --V 1024 2048 --H 32 64 --dtypes --modes frozen --repeats 1"
        " --providers qtarget/dft",
    ),
    "step": Part(
        "step",
        3,
        cuda="--model qwen3-0.6b --batch 8 --tokens 1024 --repeats 3",
        cpu="--repeats 3",
        quick="--model tiny --tokens 16 --repeats 1",
    ),
    "statistics": Part(
        "statistics_cost",
        1,
        cuda="--model qwen3-0.6b --batch 8 --tokens 1024",
        cpu="--repeats 8",
        quick="--model tiny --tokens 16 --repeats 2",
    ),
}
