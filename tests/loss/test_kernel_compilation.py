"""The Triton kernels compile to good machine code. No GPU is needed: Triton brings the compilers of NVIDIA GPUs along.

Run as a script, this file compiles what the tests name and prints one line of JSON for each kernel. It runs in a
process of its own because the other tests run the kernels in Triton's interpreter, which a process has or has not.
"""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from measured import CLOSED

from trl_qtarget import QTargetConfig
from trl_qtarget.target.embeddings import Embeddings
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


# Of 65536 registers, 128 for each of 256 threads leave room for two programs, which wait for memory in turns.
MOST_REGISTERS = 128
VOCABULARIES = {"aligned": 151936, "ragged": 50257, "tiny": 37, "two": 2, "one": 1}


class NoDevice:
    """Stands for Triton's driver: a GPU of some kind that compiles and never launches."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


class Compiled:
    """Takes a kernel's place: compiles it for the arguments of each launch, as a launch would, and keeps that."""

    def __init__(self, kernel, kept: dict):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            self.kept.setdefault(made.hash, made)

        return launch


def assembled(ptx: str, capability: int) -> dict[str, int]:
    """Registers and bytes spilled of a compiled kernel, as its assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    assembler = get_ptxas(capability) if inspect.signature(get_ptxas).parameters else get_ptxas()
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = re.search(r"\.target (\w+)", ptx)[1]
        command = [assembler.path, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report).groups()
    return {"registers": int(re.search(r"Used (\d+) registers", report)[1]), "local": int(stack) + int(stores)}


def score(config: QTargetConfig, tokens: int, vocabulary: int, dtype: torch.dtype, out: torch.dtype, softcap: float):
    """Launch the kernels as the loop over chunks does, on the second of two chunks."""
    from trl_qtarget.loss.kernels import folded

    # The products of a GPU, which a CPU has not.
    folded.mixed_gemm_supported = lambda product, operands, logits: operands != logits.dtype
    objective = config.objective(has_prior=True)
    kernel = folded.FoldingKernel(objective)
    labels, weights = torch.zeros(2 * tokens, dtype=torch.int64)[tokens:], torch.ones(tokens, dtype=dtype)
    logits, prior = (torch.zeros(tokens, vocabulary, dtype=dtype) for _ in range(2))
    embeddings = Embeddings(torch.ones(vocabulary, 2), labels)
    tile = kernel.tile(logits, labels, prior if objective.uses_prior else None, weights, embeddings)
    target = objective.target(tile, weights if objective.trust.per_sequence else None)
    kernel.write_gradient(kernel.gradient_of(logits, out), target, torch.ones((), dtype=dtype), (1.0, softcap))


def compile_all(capability: int, cases: list[dict]) -> None:
    from triton.runtime import driver

    from trl_qtarget.loss.kernels import fold, gradient

    driver.set_active(NoDevice(capability))
    kept = {}
    for module, name in ((fold, "fold_kernel"), (gradient, "gradient_kernel")):
        setattr(module, name, Compiled(getattr(module, name), kept))
    for case in cases:
        before = set(kept)
        given = dict(case)
        types = {key: getattr(torch, given.pop(key, default)) for key, default in DEFAULT_TYPES.items()}
        vocabulary = VOCABULARIES[given.pop("vocabulary", "aligned")]
        options = {"tokens": given.pop("tokens", 3), "softcap": given.pop("softcap", 0.0)}
        score(QTargetConfig(**given), vocabulary=vocabulary, **types, **options)
        for made in (kept[key] for key in kept if key not in before):
            numbers = assembled(made.asm["ptx"], capability) | {"shared": made.metadata.shared}
            sys.stdout.write(json.dumps({"case": case, "kernel": made.metadata.name, **numbers}) + "\n")


DEFAULT_TYPES = {"dtype": "float32", "out": "bfloat16"}


def compiled(capability: int, cases: list[dict], tmp_path) -> list[dict]:
    """What a process without the interpreter says of each kernel that the cases need, in the order of their making."""
    pytest.importorskip("triton.backends.nvidia.compiler", reason="needs Triton's compilers")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, str(capability), json.dumps(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "Cannot find ptxas" in run.stderr:
        pytest.skip("this Triton has no assembler for NVIDIA GPUs")
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def assert_good(kernels: list[dict]) -> None:
    assert kernels
    for kernel in kernels:
        assert kernel["local"] == 0, f"{kernel}: spills to local memory"
        assert kernel["registers"] <= MOST_REGISTERS or kernel["case"].get("dtype") == "float64", kernel
        # One number per warp, to join the lanes at the end; lanes that met in every step would need a step's size.
        assert kernel["shared"] <= 64, kernel


# What differs in the machine code: a prior or none, its sum, a mixture and of what.
REPRESENTATIVE = [
    {"method": "target_sft"},
    {"method": "gem", "softcap": 30.0},
    # All that a design may ask for, at once.
    {"method": None, "trust": "rank * margin * collision * r", "residual": "guided"},
    {"method": None, "trust": "prior_mass", "scale": "rank * margin * collision", "residual": "spared_prior"},
    {"method": "prift_mass"},
    {"method": "mask_target", "softcap": 30.0},
    {"method": "target_sft", "vocabulary": "ragged", "out": "float32", "softcap": 30.0},
]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_without_spilling(capability, tmp_path):
    kernels = compiled(capability, REPRESENTATIVE, tmp_path)
    assert len(kernels) == 2 * len(REPRESENTATIVE) - 1  # what is asked for changes nothing in the gradient
    assert_good(kernels)


def test_any_number_of_tokens_takes_the_same_code(tmp_path):
    # Else a run would compile anew whenever a batch has one token, or a number of them that 16 divides or not.
    cases = [{"method": "psft", "tokens": tokens} for tokens in (1, 2, 7, 16, 17)]
    assert [kernel["kernel"] for kernel in compiled(90, cases, tmp_path)] == ["fold_kernel", "gradient_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_combination_compiles_without_spilling(capability, tmp_path):
    cases = [{"method": name} for name in CLOSED]
    cases += [{"method": None, "trust": trust, "residual": residual} for trust in TRUSTS for residual in RESIDUALS]
    cases += [case for case in REPRESENTATIVE if case.get("method") is None]
    kinds = ("sft", "psft", "target_sft", "gem", "label_smoothing", "distill")
    for name, vocabulary, out in itertools.product(kinds, VOCABULARIES, ("bfloat16", "float32")):
        cases += [{"method": name, "vocabulary": vocabulary, "out": out, "softcap": 30.0}]
    cases += [{"method": name, "dtype": "float64", "out": "float64"} for name in kinds]
    assert_good(compiled(capability, cases, tmp_path))


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), json.loads(sys.argv[2]))
