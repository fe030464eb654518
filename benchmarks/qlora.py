"""Memory of a real QLoRA step beside the account that `examples/memory.py` computes.

    python -m benchmarks.qlora --model path/to/a/model --tokens 1024

The model is really quantised to NF4 and one step of two micro-batches really runs, with the options of
`examples/qlora.py`, in bfloat16. Counted are the bytes of all tensors alive, as every operation makes them and the
last reference to them goes: the same on a CPU as on a GPU, up to what happens inside single operations. As on CUDA,
the loss works on blocks as large as on CUDA. The peaks are those of the second micro-batch, when gradients are kept.
"""

import argparse
import json
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, PrinterCallback

from trl_qtarget.loss import head
from trl_qtarget.loss.kernels import plain


sys.path.append(str(Path(__file__).parents[1] / "examples"))

import memory
import qlora


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that were made in this context and are alive: `now`, and the `peak` since it was reset."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        tree_map_only(Tensor, lambda tensor: self._note(tensor, before), result)
        return result

    def _note(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or key in before:  # a view, or written in place
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def take_peak(self) -> int:
        """The peak so far; from here on a new one counts."""
        peak, self.peak = self.peak, self.now
        return peak


def tensors_of(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter and, if it is quantised, the tensors that go with it."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in (state.absmax, state.code, state.offset) if value is not None)
        state = getattr(state, "state2", None)


def stored_bytes(parameters: Iterator[nn.Parameter]) -> int:
    """Bytes of the memory behind parameters; shared memory counts once."""
    storages = (tensor.untyped_storage() for parameter in parameters for tensor in tensors_of(parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def blocks_of_cuda() -> Iterator[None]:
    """Let the loss work on blocks as large as it does on CUDA."""
    kept = dict(plain.BLOCK_ELEMENTS)
    plain.BLOCK_ELEMENTS.clear()
    try:
        yield
    finally:
        plain.BLOCK_ELEMENTS.update(kept)


def measure(model: str, tokens: int, method: str = "target_sft", rank: int = 16) -> dict[str, tuple[int, int]]:
    """Measured and computed bytes by line, for a folder with model and tokenizer."""
    config = AutoConfig.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        ids = torch.randint(4, config.vocab_size, (4, tokens // 2)).tolist()  # two documents in each packed row
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        options = {"model": model, "dataset": rows, "method": method, "max_length": tokens, "lora_rank": rank}
        options |= {"batch_size": 1, "accumulation": 2, "max_steps": 1, "output_dir": folder, "dtype": "bfloat16"}
        command = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        trainer = qlora.make_trainer(qlora.parse_arguments(command))
        trainer.args.save_strategy = "no"
        trainer.args.disable_tqdm = True
        trainer.remove_callback(PrinterCallback)
        peaks = _peaks_of_last_batch(trainer)

    shapes = memory.Shapes.of(config)
    computed = memory.account(config, tokens, rank, method)
    weights, adapters = memory.weight_bytes(shapes), memory.adapter_bytes(shapes, rank)
    frozen = [value for value in trainer.model.parameters() if not value.requires_grad]
    quantized = [value for value in frozen if hasattr(value, "quant_state")]
    kept = [value for value in frozen if not hasattr(value, "quant_state")]
    trained = [value for value in trainer.model.parameters() if value.requires_grad]
    found = {
        "linear layers, NF4": stored_bytes(quantized),
        "embeddings, head, norms, bfloat16": stored_bytes(kept),
        "adapters": stored_bytes(trained),
    }
    lines = {name: (size, (weights | adapters)[name]) for name, size in found.items()}
    gradients = adapters["their gradients"]
    held = gradients + computed.checkpoints + computed.steady[memory.MASK]
    lines["their gradients"] = (peaks["gradients"], gradients)
    lines["peak of the loss"] = (peaks["loss"], held + sum(computed.loss.values()))
    lines["peak of backward"] = (peaks["backward"], held + computed.layer)
    return lines


def _peaks_of_last_batch(trainer: Any) -> dict[str, int]:
    peaks: dict[str, int] = {}
    fused_loss, backward = head.fused_loss, trainer.accelerator.backward
    tracker = TensorMemory()

    def watched_loss(*args, **kwargs):
        tracker.take_peak()
        result = fused_loss(*args, **kwargs)
        peaks["loss"] = tracker.take_peak()
        return result

    def watched_backward(*args, **kwargs):
        tracker.take_peak()
        backward(*args, **kwargs)
        peaks["backward"] = tracker.take_peak()
        gradients = (value.grad for value in trainer.model.parameters() if value.grad is not None)
        peaks["gradients"] = sum(value.nbytes for value in gradients)

    head.fused_loss, trainer.accelerator.backward = watched_loss, watched_backward
    try:
        with blocks_of_cuda(), tracker:
            trainer.train()
    finally:
        head.fused_loss = fused_loss
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Folder with a model and its tokenizer.")
    parser.add_argument("--tokens", type=int, default=1024, help="Tokens of a micro-batch.")
    parser.add_argument("--method", default="target_sft")
    arguments = parser.parse_args()
    lines = measure(arguments.model, arguments.tokens, arguments.method)
    print(f"{'':<40}{'measured':>12}{'computed':>12} MB")
    for name, (measured, computed) in lines.items():
        print(f"{name:<40}{measured / 1e6:>12.3f}{computed / 1e6:>12.3f}  {computed / measured - 1:+.1%}")


if __name__ == "__main__":
    main()
