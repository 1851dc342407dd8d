"""What kernels for a GPU are given, without one: alignment, order in memory, device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.kernels import few_tokens, masked, one_row, packed_linear, pivoted
from lrc.compressors.kernels.implementations import Need
from lrc.compressors.kernels.masked import EIGHT_OF, Masked

NAME = "lrc.compressors.kernels"


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Return the devices that are made current, the last one last."""
    found: list[torch.device] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        found.append(chosen)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    return found


def test_the_kernel_for_one_row_reads_neighbouring_numbers(
    monkeypatch: pytest.MonkeyPatch, devices: list[torch.device]
) -> None:
    given = []

    def few_rows(p: Tensor, c: Tensor, inverse: None) -> Tensor:
        given.append(p)
        return p @ c.T

    kernels = SimpleNamespace(few_rows=few_rows)
    monkeypatch.setitem(sys.modules, f"{NAME}.pivoted_triton", kernels)
    monkeypatch.setattr("lrc.compressors.kernels.pivoted_triton", kernels, raising=False)
    monkeypatch.setattr(one_row, "_serves", lambda x, weight: True)
    x = torch.randn(1, 6, 4)[:, :, -1]  # numbers are 4 apart
    weight = torch.randn(3, 6)
    torch.testing.assert_close(one_row.linear(x, weight), x @ weight.T)
    assert given[0].stride(1) == 1


def test_an_input_of_another_width_is_not_given_to_the_kernel_for_one_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_row, "needs_gradients", lambda *_: False)
    monkeypatch.setattr(one_row, "_usable", {0: True})
    half: dict[str, Any] = {
        "is_cuda": True,
        "device": torch.device("cuda:0"),
        "dtype": torch.bfloat16,
        "get_device": lambda: 0,
        "is_contiguous": lambda: True,
    }
    weight: Any = SimpleNamespace(shape=(3, 6), **half)
    for width in (5, 6, 7):
        x: Any = SimpleNamespace(shape=(1, width), numel=lambda: width, **half)  # noqa: B023
        assert one_row._serves(x, weight) == (width == 6)


def test_the_pivoted_kernels_are_launched_on_the_device_of_the_input(
    monkeypatch: pytest.MonkeyPatch, devices: list[torch.device]
) -> None:
    kernels = SimpleNamespace(
        few_rows=lambda p, c, inverse: devices[-1],
        interleave=lambda p, others, order: devices[-1],
    )
    monkeypatch.setattr(pivoted, "_kernels", lambda: kernels)
    monkeypatch.setattr(pivoted, "has_kernel", lambda p: True)
    order = torch.arange(5)
    for rows in (1, 2):
        p = torch.randn(rows, 2)
        found: Any = pivoted.pivoted_rows(p, torch.randn(3, 2), order, order.int())
        assert devices == [p.device]
        assert found is devices.pop()


def test_masked_kernels_get_an_input_that_starts_at_16_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def kernel(x: Tensor, stored: Masked) -> Tensor:
        given.append(x)
        return x

    monkeypatch.setattr(masked, "_few_tokens", kernel)
    stored = Masked(EIGHT_OF, 64, torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.uint8), n=4)
    x = torch.randn(65, dtype=torch.bfloat16)[1:].view(1, 64)
    assert not few_tokens.starts_at_16_bytes(x)
    masked.run(x, stored)
    assert few_tokens.starts_at_16_bytes(given[0])
    assert torch.equal(given[0], x)


def test_without_nvrtc_masks_are_multiplied_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "cuda_problem", lambda _: "no NVRTC here")
    mask = torch.zeros(2, 8, dtype=torch.uint8)
    stored = Masked(EIGHT_OF, 64, torch.zeros(2, 8, 4, dtype=torch.bfloat16), mask, n=4)
    assert masked._few_tokens(torch.zeros(4, 64, dtype=torch.bfloat16), stored) is None


def test_matrices_whose_offsets_need_more_than_32_bits_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, problem in ((packed_linear, "cuda_problem"), (masked, "triton_problem")):
        monkeypatch.setattr(module, problem, lambda _: None)
        for d_out, refused in ((2**15, False), (2**16, True)):
            need = Need("any", 4, torch.device("cuda:0"), torch.bfloat16, (d_out, 2**15))
            reason = module.refuse(need)
            assert (reason == "2**31 entries or more") if refused else (reason is None)
