"""What the fused loss allocates: chunks of logits, and little beside them."""

import weakref

import pytest
import torch
from measured import CLOSED
from problems import make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from trl_qtarget import QTargetConfig, linear_qtarget_loss
from trl_qtarget.loss import chunks
from trl_qtarget.loss.kernels import plain
from trl_qtarget.target import embeddings


# All is 2**10 times smaller than by default; what is per token or per vocabulary entry stays small beside it.
SHRINK = 10
TOKENS, VOCABULARY, WIDTH = 512, 1024, 4


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that were made inside and lived at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, torch.Tensor):
                self.known.add(value.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size


@pytest.fixture
def chunk_bytes(monkeypatch):
    """Sizes as on an accelerator, but smaller; returns the bytes of a chunk of float32 logits."""
    for module, name in (
        (chunks, "_CHUNK_ELEMENTS"),
        (plain, "DEFAULT_BLOCK_ELEMENTS"),
        (embeddings, "_SEARCH_ELEMENTS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) >> SHRINK)
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", {})
    monkeypatch.setattr(plain, "_keep_freed_memory", lambda: None)  # which is never written to, so it takes none
    assert TOKENS * VOCABULARY > 4 * chunks._CHUNK_ELEMENTS
    return 4 * chunks._CHUNK_ELEMENTS


@pytest.mark.parametrize("name", [*CLOSED, "neighbors"])
def test_memory_of_the_loss(name, chunk_bytes):
    problem = make_problem(TOKENS, VOCABULARY, WIDTH, 40, bias=False)
    free = QTargetConfig(None, trust="probability", residual="neighbors", top_k=2)
    config = free if name == "neighbors" else QTargetConfig(name)
    arguments = problem.linear_arguments()
    arguments = {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in arguments.items()}
    hidden, weight = (x.float().requires_grad_() for x in (problem.hidden, problem.weight))
    with PeakMemory() as memory:
        linear_qtarget_loss(hidden, weight, problem.labels, config, **arguments)
    # A chunk of the policy's logits, one of the prior's, and about one more in blocks; see `docs/design.md`.
    expected = 1 + config.objective(has_prior=True).uses_prior
    # Parts of a target that are not the policy exist beside each other, as tensors of a block.
    more = {"otr": 1.4, "mask_target": 1.8, "lp_sft": 2.3}.get(name, 1.2)
    assert expected < memory.peak / chunk_bytes < expected + more


@pytest.mark.parametrize(
    ("free", "expected"), [(80e9, 2**29), (9e9, 2**29), (8e9, 2**28), (3e9, 2**27), (0.2e9, 2**26)]
)
def test_a_chunk_on_a_gpu_is_small_beside_what_is_free(free, expected, monkeypatch):
    chunks._cuda_chunk_bytes.cache_clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free / 2), 100e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(free))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(free / 2))
    device = torch.device("cuda", 0)
    assert chunks.chunk_elements(device, torch.float32, 1) == expected // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100e9))  # asked once: it stays what it was
    assert chunks.chunk_elements(device, torch.float32, 2) == expected // 8
    chunks._cuda_chunk_bytes.cache_clear()
