"""One training step in a process group of one: DDP and NCCL on one GPU (Gloo on a CPU), as far as one GPU allows.

python -m benchmarks.gpu.nccl cuda
"""

import argparse
import os
import socket
import tempfile

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from .. import step


def main(argv: list[str] | None = None) -> None:
    """Train two steps, then sum, gather and scatter some numbers; raise where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("device", choices=["cuda", "cpu"])
    device = parser.parse_args(argv).device
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in one.items()}
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sizes = {"model": "tiny", "batch": 2, "tokens": 16, "steps": 2, "gradient_checkpointing": False, "optim": None}
    dtype = "bf16" if device == "cuda" else "fp32"
    arguments = argparse.Namespace(**sizes, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as directory:
        trainer, _ = step.build("qtarget/target_sft", "lora", directory, arguments)
        trainer.train()
    backend = distributed.get_backend()
    if not isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise SystemExit(f"the model was not wrapped by DDP but by {type(trainer.model_wrapped).__name__}.")
    if backend != {"cuda": "nccl", "cpu": "gloo"}[device]:
        raise SystemExit(f"the backend is {backend}.")
    numbers = torch.arange(8.0, device=device)
    distributed.all_reduce(numbers)
    gathered = torch.empty_like(numbers)
    distributed.all_gather_into_tensor(gathered, numbers)
    if not torch.equal(gathered, torch.arange(8.0, device=device)):
        raise SystemExit(f"{backend} changed the numbers: {gathered.tolist()}.")
    distributed.destroy_process_group()
    print(f"{backend}: two steps under DDP, a sum and a gather are right.")


if __name__ == "__main__":
    main()
