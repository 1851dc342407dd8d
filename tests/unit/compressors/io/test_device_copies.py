"""Copies between devices, against those of `Tensor.copy_` and `Tensor.to`."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.io import device_copies
from lrc.compressors.io.device_copies import copy_, on_device, to_device, to_host

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = [(), (0, 3), (5,), (1, 7), (40, 3, 5), (1000, 17)]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_on_a_cpu_nothing_is_copied_without_need() -> None:
    x = numbers(4, 3)
    assert on_device(x, "cpu") is x
    assert to_host(x) is x
    assert on_device(x, "cpu", torch.float64).dtype == torch.float64
    copied = to_device(x, "cpu")
    assert torch.equal(copied, x)
    assert copied.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_converted_to_the_type_of_the_target(shape: tuple[int, ...]) -> None:
    x, target = numbers(*shape), torch.empty(shape, dtype=torch.bfloat16)
    copy_(target, x)
    assert torch.equal(target, x.bfloat16())


@pytest.mark.parametrize("n_bytes", [1, 60, 200, 10**6])
def test_pieces_have_all_rows_once(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "PINNED_BYTES", n_bytes)
    source = numbers(40, 3, 5)
    target = torch.zeros(40, 3, 5, dtype=torch.float64)
    for place, part in device_copies._pieces(target, source):
        assert place.nbytes <= max(n_bytes, 8 * 15)
        place += part
    assert torch.equal(target, source.double())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_receives_and_returns_all_values(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "PINNED_BYTES", 200)
    x = numbers(*shape)
    for source in (x, x.mT) if len(shape) > 1 else (x,):
        there = on_device(source, "cuda", dtype)
        assert there.is_cuda
        back = torch.empty(source.shape)
        copy_(back, there)
        assert torch.equal(back, source.to(dtype).float())
        assert torch.equal(to_host(there), source.to(dtype))


@needs_gpu
def test_rows_of_larger_tensors_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "PINNED_BYTES", 200)
    x, there = numbers(40, 6), torch.zeros(80, 6, device="cuda")
    copy_(there[20:60], x)
    back = torch.ones(50, 6)
    copy_(back[:40, :3], there[20:60, 3:])
    assert torch.equal(back[:40, :3], x[:, 3:])
    assert torch.equal(back[:, 3:], torch.ones(50, 3))
    assert not there[:20].any()
    assert not there[60:].any()
