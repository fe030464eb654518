"""The Triton kernels on another device than the tests' tensors: `KERNELS_ON=cuda pytest tests/loss/test_kernels.py`.

The tests of the kernels make tensors on a CPU, where the kernels run in Triton's interpreter. On a machine with a GPU
the same tests run with compiled kernels: each launch takes the memory of its tensors to the device, as it lies there,
one tensor over another included, and brings it back. `KERNELS_ON=cpu` does the same with a copy on the CPU and the
interpreter, to try this out.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


DEVICE = os.environ.get("KERNELS_ON")


class OnDevice:
    """A Triton kernel whose launches take tensors of a CPU to `device` and back."""

    def __init__(self, kernel: Any, device: str):
        self.kernel, self.device = kernel, torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            # What a test counts is not this.
            with _disable_current_modes(), torch.no_grad():
                bytes_of: dict[int, tuple[Tensor, Tensor]] = {}
                moved = [self._moved(each, bytes_of) if isinstance(each, Tensor) else each for each in arguments]
                self.kernel[grid](*moved, **options)
                for here, there in bytes_of.values():
                    here.copy_(there)

        return launch

    def _moved(self, value: Tensor, bytes_of: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """The same view of a copy of its memory; tensors that share their memory share the copy."""
        storage = value.untyped_storage()
        if storage.data_ptr() not in bytes_of:
            here = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
            bytes_of[storage.data_ptr()] = here, here.to(self.device, copy=True)
        there = bytes_of[storage.data_ptr()][1]
        view = torch.empty(0, dtype=value.dtype, device=self.device)
        return view.set_(there.untyped_storage(), value.storage_offset(), value.size(), value.stride())


def install(device: str) -> None:
    """Have every launch of the package's kernels run on `device`, and let the loss take them for tensors of a CPU."""
    from trl_qtarget.loss import choice
    from trl_qtarget.loss.kernels import fold, gradient

    fold.fold_kernel = OnDevice(fold.fold_kernel, device)
    gradient.gradient_kernel = OnDevice(gradient.gradient_kernel, device)
    choice._interpreted = lambda: True
