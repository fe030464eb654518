"""Start real jobs of several processes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import Cell, save_models


_HERE = Path(__file__).parent
# How transformers shards models as it loads them, by the name of the backend.
NATIVE = {
    "native-fsdp2": {"fsdp_size": 2},
    "native-tp2": {"tp_size": 2},
    "native-fsdp2-tp2": {"fsdp_size": 2, "tp_size": 2},
    "native-tp2-ep2": {"tp_size": 2, "ep_size": 2},
}
# Seconds after which a job counts as hung, and more of them for every cell that it runs.
_TIMEOUT, _OF_A_CELL = 540, 10
# A launcher passes SIGTERM on to its workers, and gives them up to 30 seconds.
_GRACE = 40


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


# DeepSpeed compiles an extension when it first runs. Each environment has its own, so that two do not meet.
_EXTENSIONS = Path(sys.prefix) / "torch_extensions"


def _remove_stale_locks() -> None:
    """A job that is killed while it compiles leaves a lock that torch waits for without end."""
    for lock in _EXTENSIONS.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > 180:
            lock.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """Of a job on CPU processes: one thread each, this checkout's package, no progress bars."""
    _remove_stale_locks()
    paths = [str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TORCH_EXTENSIONS_DIR": str(_EXTENSIONS),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def torchrun(processes: int = 2) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*command, "--master_port", str(free_port())]


def accelerate_launch(
    folder: Path, stage: int, partition_everything: bool = False, processes: int = 2, pieces: int = 1
) -> list[str]:
    """`accelerate launch` with ZeRO on CPU processes.

    By default ZeRO-3 keeps small parameters whole; `partition_everything` takes even those apart, and prefetches.
    Models that the trainer loads by path are sharded while they are loaded. Rows are split over `pieces` ranks.
    """
    settings = {"zero_stage": stage, "zero3_init_flag": stage == 3}
    if partition_everything:
        zero = {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 10_000,
            "stage3_max_live_parameters": 20_000,
            "stage3_max_reuse_distance": 20_000,
        }
        automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
        deepspeed = {"zero_optimization": zero, "gradient_clipping": "auto"} | dict.fromkeys(automatic, "auto")
        file = folder / "deepspeed.json"
        file.write_text(json.dumps(deepspeed))
        settings = {"deepspeed_config_file": str(file), "zero3_init_flag": True}
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": settings,
        "num_machines": 1,
        "num_processes": processes,
        "use_cpu": True,
    }
    if not partition_everything:  # with a DeepSpeed file it would be said twice
        config["mixed_precision"] = "no"
    if pieces > 1:
        split = {"sp_size": pieces, "sp_backend": "deepspeed", "sp_attn_implementation": "sdpa"}
        config["parallelism_config"] = {f"parallelism_config_{name}": value for name, value in split.items()}
    file = folder / "accelerate.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*command, "--main_process_port", str(free_port())]


def _ranks(sizes: dict[str, Any]) -> int:
    return sizes.get("fsdp_size", 1) * sizes.get("tp_size", 1)


def launcher(backend: str, folder: Path) -> list[str]:
    """Command of a backend, up to the script."""
    if backend in ("ddp", "fsdp2"):
        return torchrun()
    if backend in NATIVE:
        return torchrun(_ranks(NATIVE[backend]))
    pieces, zero = (2, backend.removeprefix("sp2-")) if backend.startswith("sp2-") else (1, backend)
    stage, partition = int(zero[4]), zero.endswith("partitioned")
    return accelerate_launch(folder, stage, partition, pieces=pieces)


def variables_of(backend: str) -> dict[str, str]:
    """What the processes of a backend find in their environment."""
    return {"CELLS_DISTRIBUTED_CONFIG": json.dumps(NATIVE[backend])} if backend in NATIVE else {}


def start(command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen:
    """Start a job whose output goes to a file, in a process group of its own; `variables` are of its environment."""
    with log.open("w") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment() | variables, start_new_session=True
        )


def end(job: subprocess.Popen) -> None:
    """End a job and all that it started; nothing to do where it has ended by itself."""
    deadline = time.monotonic() + _GRACE
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            job.poll()
            os.killpg(job.pid, 0)  # ProcessLookupError: none is left
            time.sleep(0.1)
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def outcomes_of(script: str, folder: Path, backend: str = "ddp") -> dict[str, str]:
    """What each case of a script of `tests/support` said, run by two ranks: an error, or nothing."""
    log, found = folder / "log.txt", folder / "outcomes.json"
    finish(start([*launcher(backend, folder), str(_HERE / script), str(found)], log), log)
    return json.loads(found.read_text())


def finish(job: subprocess.Popen, log: Path, timeout: float = _TIMEOUT) -> None:
    """Wait for a job; one that hangs is ended with all that it started, and a RuntimeError tells its last lines."""
    try:
        job.wait(timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the job hung: {log.read_text()[-4000:]}") from None
    finally:
        end(job)


def script_arguments(cells: Sequence[Cell], folder: Path) -> list[str]:
    """What `cells.py` is told: which cells, and where results go."""
    file = folder / "cells.json"
    file.write_text(json.dumps([asdict(cell) for cell in cells]))
    return [str(file), str(folder)]


def run_cells(backend: str, cells: Sequence[Cell], folder: Path) -> None:
    """Run cells one after another in one job of two processes; what came out is in `folder`."""
    save_models(folder)
    log = folder / "log.txt"
    script = str(_HERE / ("fsdp2.py" if backend == "fsdp2" else "cells.py"))
    command = [*launcher(backend, folder), script, *script_arguments(cells, folder)]
    job = start(command, log, **variables_of(backend))
    finish(job, log, _TIMEOUT + _OF_A_CELL * len(cells))
