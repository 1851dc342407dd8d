"""Without a usable GPU or Triton, or if a kernel fails: one warning, and the plain product."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lrc.compressors.kernels import Entry, failures, optimize, slow_layers, triton_device
from lrc.compressors.kernels.triton_device import triton_problem
from lrc.compressors.layers import QuantizationArgs, packed_weight
from lrc.compressors.layers.packed_weight import PackedLinear


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_reported", set())


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Return what `triton_problem` says about a pretended GPU and a pretended Triton."""

    def find(
        capability: tuple[int, int] = (9, 0),
        importing: BaseException | None = None,
        product: Callable[..., Any] | None = None,
    ) -> str | None:
        def import_module(name: str) -> None:
            assert name == "triton"
            if importing is not None:
                raise importing

        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(triton_device, "import_module", import_module)
        if product is not None:
            monkeypatch.setattr(triton_device, "_interleaves", product)
        found: str | None = triton_problem.__wrapped__(0)
        return found

    return find


def test_without_triton_the_reason_says_how_to_install_it(problem: Any) -> None:
    missing = ModuleNotFoundError("No module named 'triton'", name="triton")
    assert problem(importing=missing) == "Triton is not installed; `pip install triton`"


def test_a_gpu_that_is_too_old_is_named_also_without_triton(problem: Any) -> None:
    missing = ModuleNotFoundError("No module named 'triton'", name="triton")
    for importing in (None, missing):
        text = problem(capability=(7, 5), importing=importing)
        assert "cuda:0 (Tesla T4) has compute capability 7.5, and the kernels need 8.0" in text
        assert "pip" not in text


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcuda.so.1: cannot open shared object file"),
        OSError("bad library"),
        ModuleNotFoundError("No module named 'triton._C'", name="triton._C"),
        RuntimeError("two versions\nof a library"),
    ],
)
def test_a_broken_triton_is_a_reason(problem: Any, error: Exception) -> None:
    text = problem(importing=error)
    assert f"Triton cannot be imported ({type(error).__name__}: " in text
    assert str(error).splitlines()[0] in text
    assert "pip install --force-reinstall torch triton" in text


def test_kernels_that_do_not_compile_or_are_wrong_are_a_reason(problem: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler\nand more")

    text = problem(product=fail)
    assert "cannot compile or launch a kernel (RuntimeError: Failed to find C compiler)" in text
    assert "gcc" in text
    assert "wrong results" in problem(product=lambda _: False)
    assert problem(product=lambda _: True) is None


def packed(bits: int = 4, rows: int = 8) -> PackedLinear:
    generator = torch.Generator().manual_seed(bits)
    module = PackedLinear(32, rows, QuantizationArgs.parse(f"int{bits}"), dtype=torch.float32)
    nn.init.ones_(module.weight_scale)
    words = torch.randint(2**30, module.weight_packed.shape, generator=generator)
    module.weight_packed.copy_(words)
    return module.requires_grad_(False)


class OnGpu(nn.ModuleDict):
    """A model that says that it is on a GPU."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter([SimpleNamespace(device=torch.device("cuda:0"))] * 2)


def test_loading_on_a_gpu_gives_one_warning_with_what_where_and_remedy(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "Triton: Triton is not installed; `pip install triton`"
    model = OnGpu({"q": packed(), "k": packed(), "v": packed(3)})
    x = torch.randn(2, 32)
    expected = model["q"](x)
    monkeypatch.setattr(
        packed_weight, "select", lambda need: reason if need.codec == 4 else "other reason"
    )
    with caplog.at_level(logging.WARNING):
        slow = optimize(model)
    assert slow == {"q": reason, "k": reason, "v": "other reason"}
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("without a fast path on cuda:0, compressed weights are multiplied by")
    assert f"{reason} (2 modules, such as q); other reason (1 modules, such as v)" in text
    assert torch.equal(model["q"](x), expected)


def test_nothing_is_said_if_all_have_a_fast_path_or_on_a_cpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weight, "select", lambda _: "no kernel")
    optimize(nn.ModuleDict({"q": packed()}))
    entry = Entry("fast", "packed_linear", "cpu", [4], run=lambda *_: None)
    monkeypatch.setattr(packed_weight, "select", lambda _: entry)
    optimize(OnGpu({"q": packed()}))
    assert caplog.records == []


def failing(error: BaseException) -> Entry:
    def run(*_: Any) -> None:
        raise error

    return Entry("Triton", "packed_linear", "cpu", range(2, 9), run)


def test_a_kernel_that_fails_at_a_call_is_replaced_by_the_plain_product(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("out of resource: shared memory, Required: 300000\nmore")
    model = nn.ModuleDict({"q": packed(), "k": packed()})
    x = torch.randn(1, 3, 32)
    expected = model["q"](x)
    monkeypatch.setattr(packed_weight, "select", lambda _: failing(error))
    assert optimize(model) == {}
    for _ in range(2):
        for name in ("q", "k"):
            y = model[name](x)
            assert y.shape == (1, 3, 8)
            assert torch.equal(y, expected)
    (record,) = caplog.records  # for both layers and calls
    assert "RuntimeError: out of resource: shared memory, Required: 300000; " in record.getMessage()
    reasons = slow_layers(model)
    assert reasons.keys() == {"q", "k"}
    assert all("Triton: failed at a call (RuntimeError: out of" in r for r in reasons.values())


@pytest.mark.parametrize("shape", [(1, 16), (2, 64), (1, 2, 64)])
def test_an_input_of_the_wrong_width_is_an_error_and_not_given_to_a_kernel(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = packed()
    monkeypatch.setattr(packed_weight, "select", lambda _: failing(AssertionError("called")))
    module.optimize()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.randn(shape))
    assert module.entry is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
def test_running_out_of_memory_is_not_a_failure_of_the_kernel(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = packed()
    monkeypatch.setattr(packed_weight, "select", lambda _: failing(error))
    module.optimize()
    with pytest.raises(type(error)):
        module(torch.randn(1, 32))
    assert module.entry is not None
