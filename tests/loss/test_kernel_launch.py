"""Where the Triton kernels are launched, into which memory they write, and what is tried before they are used."""

import contextlib

import pytest
import torch
from kernels_on import OnDevice

from trl_qtarget import QTargetConfig
from trl_qtarget.gemm import Head


pytest.importorskip("triton")

from trl_qtarget.loss import choice
from trl_qtarget.loss.kernels import fold, folded, gradient


@pytest.fixture
def kernel(monkeypatch):
    """Of a GPU, as far as memory goes: its products take bfloat16."""
    monkeypatch.setattr(folded, "mixed_gemm_supported", lambda product, operands, out: operands == torch.bfloat16)
    return folded.FoldingKernel(QTargetConfig("target_sft").objective(has_prior=True))


def test_each_launch_is_on_the_device_of_the_logits(kernel, monkeypatch):
    # Triton takes the current device, which is another where a model is spread over several.
    current, launched = ["another"], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Recorded:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(fold, "fold_kernel", Recorded())
    monkeypatch.setattr(gradient, "gradient_kernel", Recorded())
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    tile = kernel.tile(logits, labels, logits.clone(), None, None)
    target = QTargetConfig("target_sft").objective(has_prior=True).target(tile)
    kernel.write_gradient(logits, target, torch.ones(()), (1.0, 0.0))
    assert len(launched) == 2 and all(tensor is logits for tensor in launched) and current == ["another"]


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_a_narrower_gradient_takes_the_place_of_the_logits_only_on_nvidia(kernel, hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    logits = torch.zeros(3, 8)
    out = kernel.gradient_of(logits, torch.bfloat16)
    assert out.data_ptr() == logits.data_ptr() and out.shape == logits.shape
    assert out.dtype == (torch.float32 if hip else torch.bfloat16)


def test_all_threads_meet_between_reading_and_overwriting():
    # The interpreter has one thread, so it would not miss a barrier. Step s overwrites what step s // 2 has read.
    meetings = [step for step in range(300) if gradient.must_wait.fn(step)]
    assert len(meetings) == 8
    for step in range(300):
        assert any(step // 2 <= meeting <= step for meeting in meetings)


@pytest.mark.parametrize(("vocabulary", "tries"), [(151936, 2), (50257, 1)])
def test_what_is_tried_is_the_code_that_is_used(vocabulary, tries, monkeypatch):
    # Triton compiles rows that begin at multiples of 16 elements otherwise than those that do not.
    hidden, head = torch.zeros(2, 3), Head(torch.zeros(1).expand(vocabulary, 3))  # only sizes are read of the weight
    given = dict.fromkeys(("prior_head", "prior_hidden", "token_weights", "sequence_ids"))
    small = choice._small({**given, "hidden": hidden, "head": head})
    tried = small["head"].weight.size(0)
    assert (tried % 16 == 0) == (vocabulary % 16 == 0)
    assert tried % folded._BLOCK and tried > 2 * folded._BLOCK, "several steps, the last one ragged"

    asked = []
    monkeypatch.setattr(choice, "_agreed", {})
    monkeypatch.setattr(choice, "disagreement", lambda batch, kernel: asked.append(batch["head"].weight.size(0)))
    objective = QTargetConfig("sft").objective(has_prior=False)
    for size in (vocabulary, vocabulary + 16, vocabulary + 1):
        batch = {"hidden": hidden, "head": Head(torch.zeros(1).expand(size, 3))}
        assert choice._agrees({**given, **batch, "objective": objective})
    assert asked == [vocabulary, vocabulary + 1][:tries]


def test_a_kernel_on_another_device_works_in_the_memory_that_it_is_given():
    # As `KERNELS_ON` runs the tests of the kernels: here on a copy, and with a result over what is read.
    class Halved:
        def __getitem__(self, grid):
            return lambda out, given, factor, **options: out.copy_((factor * given).to(out.dtype))

    given = torch.arange(12.0).view(3, 4)[:, 1:]
    out = given.as_strided((3, 2), (4, 1), 1).view(torch.bfloat16)[:, :3]
    expected = 0.5 * given
    OnDevice(Halved(), "cpu")[(3,)](out, given, 0.5, BLOCK=4)
    assert torch.equal(out.float(), expected)
