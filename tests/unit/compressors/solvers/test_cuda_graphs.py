"""Recorded steps: they repeat what the function does, on the device of its tensors."""

from collections.abc import Callable

import pytest
import torch

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.column_quantizer import ColumnQuantizer
from lrc.compressors.solvers.cuda_graphs import record


def counted(device: torch.device, times: int) -> float:
    count = torch.zeros(1, device=device)

    def step() -> None:
        count.add_(1)

    repeat = record(step, device)
    for _ in range(times - 1):
        repeat()
    return float(count)


def test_without_a_gpu_the_step_itself_is_repeated() -> None:
    assert counted(torch.device("cpu"), 10) == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recording_counts_as_the_first_time() -> None:
    assert counted(torch.device("cuda"), 1) == 1
    assert counted(torch.device("cuda"), 10) == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recording_keeps_the_tensors_that_its_step_refers_to() -> None:
    device = torch.device("cuda")
    total = torch.zeros(1, device=device)

    def adding() -> Callable[[], None]:
        ones = torch.ones(2**24, device=device)  # too large for memory that the allocator divides
        return record(lambda: total.add_(ones.sum()), device)

    repeat = adding()
    torch.cuda.empty_cache()
    repeat()
    assert float(total) == 2 * 2**24


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_need_not_be_the_current_one() -> None:
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert counted(other, 10) == 10
    g = torch.Generator().manual_seed(0)
    scheme = QuantizationArgs.parse("int4")
    target, coupling = torch.randn(8, 20, generator=g), 0.1 * torch.randn(8, 8, generator=g)
    scale = 0.1 + torch.rand(8, 20, generator=g)
    inputs = [t.double() for t in (target, coupling, scale)]
    expected = ColumnQuantizer(scheme, torch.device("cpu")).quantize(*inputs, None)
    quantizer = ColumnQuantizer(scheme, other)
    for _ in range(2):
        found = quantizer.quantize(*(t.float().to(other) for t in inputs), None)
        for one, same in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu().double(), same, rtol=0, atol=1e-5)
