"""Recorded steps: they repeat what the function does, on the device of its tensors."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

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


class Recorder:
    """Stands for CUDA: notes what a recording does, and fails at some operations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends_badly: bool = False) -> None:
        self.begun, self.replayed, self.collects = 0, 0, list[bool]()
        recorder = self

        class Graph:
            def capture_begin(self, **options: object) -> None:
                recorder.begun += 1
                recorder.collects.append(gc.isenabled())

            def capture_end(self) -> None:
                if ends_badly:
                    raise RuntimeError("operation failed due to a previous error")

            def replay(self) -> None:
                recorder.replayed += 1

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        fakes = {
            "CUDAGraph": Graph,
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "empty_cache": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def failing(*numbers: int) -> Callable[[], None]:
    """Return a function that fails at some of its calls, counted from one."""
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls in numbers:
            raise RuntimeError(f"call {calls}: CUBLAS_STATUS_EXECUTION_FAILED")

    return step


def test_garbage_is_not_collected_during_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    record(failing(), torch.device("cuda"))()
    assert recorder.collects == [False]
    assert gc.isenabled()
    assert (recorder.begun, recorder.replayed) == (1, 1)


def test_a_recording_that_fails_once_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    record(failing(2), torch.device("cuda"))()
    assert (recorder.begun, recorder.replayed) == (2, 1)


def test_the_error_of_the_step_is_raised_not_that_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(monkeypatch, ends_badly=True)
    with pytest.raises(RuntimeError, match="call 3: CUBLAS_STATUS_EXECUTION_FAILED"):
        record(failing(2, 3), torch.device("cuda"))
    assert recorder.begun == 2
    assert gc.isenabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_earlier_recording_in_a_reference_cycle_does_no_harm() -> None:
    device = torch.device("cuda")
    count = torch.zeros(1, device=device)
    garbage: list[object] = [record(lambda: count.add_(1), device)]
    garbage.append(garbage)
    del garbage

    def step() -> None:
        if torch.cuda.is_current_stream_capturing():
            assert [[] for _ in range(100_000)]  # starts a collection, if it is enabled
        count.add_(1)

    record(step, device)()
    assert float(count) == 3


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
