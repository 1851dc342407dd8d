"""Memory goes back to the system while a model is loaded, and no tensor in use changes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc.compressors.benchmark.memory import Meter, weight_bytes
from lrc.compressors.io import freed_memory
from lrc.compressors.io.freed_memory import (
    ReplacedTensors,
    drop_file_pages,
    drop_shared_pages,
    trim,
)
from lrc.compressors.kernels import optimize
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.configs.size import MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses madvise")


def mapped(path: Path, **tensors: Tensor) -> dict[str, Tensor]:
    """Return tensors in a file that is mapped into memory."""
    save_file(tensors, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in tensors}


@linux
def test_pages_of_a_mapped_file_are_dropped_and_read_again(tmp_path: Path) -> None:
    stored = torch.arange(4 * MIB, dtype=torch.int32)
    found = mapped(tmp_path / "x.safetensors", x=stored, y=torch.ones(100))
    meter = Meter("cpu")
    assert torch.equal(found["x"], stored)  # reads all pages
    before = meter.used()
    drop_file_pages([found["x"]])
    assert before - meter.used() > 14 * MIB
    assert torch.equal(found["x"], stored)
    assert torch.equal(found["y"], torch.ones(100))


def test_other_memory_stays_as_it_is(tmp_path: Path) -> None:
    values, changed = torch.randn(2 * MIB), torch.empty(0)
    copy = values.clone()
    found = mapped(tmp_path / "x.safetensors", x=torch.zeros(MIB), y=torch.zeros(MIB))
    changed = found["y"].fill_(3)
    drop_file_pages([values, found["x"], torch.empty(0)])
    assert torch.equal(values, copy)
    assert bool((changed == 3).all())  # only what was given loses its changes


def test_mappings_of_devices_and_shared_ones_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "1000-2000 rw-p 00000000 fe:00 1 /a folder/x.safetensors",
        "2000-3000 rw-s 00000000 fe:00 1 /folder/x.safetensors",
        "3000-4000 rw-p 00000000 00:05 1 /dev/zero",
        "4000-5000 rw-p 00000000 00:00 0 [heap]",
        "5000-6000 rw-p 00000000 00:00 0 ",
    )
    path = tmp_path / "maps"
    path.write_text("\n".join(lines))
    monkeypatch.setattr(freed_memory, "MAPS", path)
    assert freed_memory._mapped_files() == [(0x1000, 0x2000)]
    monkeypatch.setattr(freed_memory, "MAPS", tmp_path / "none")
    assert freed_memory._mapped_files() == []


def test_without_these_functions_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freed_memory, "_of_libc", lambda _: None)
    found = mapped(tmp_path / "x.safetensors", x=torch.ones(MIB))
    replaced = ReplacedTensors()
    replaced([found["x"]])
    replaced.flush()
    trim()
    assert bool((found["x"] == 1).all())


class Layers(nn.ModuleList):
    """Layers of integers whose tensors are in a mapped file, as transformers loads them."""

    def __init__(self, path: Path, count: int, scheme: str) -> None:
        args = QuantizationArgs.parse(scheme)
        super().__init__(PackedLinear(2048, 2048, args, device="meta") for _ in range(count))
        tensors = {
            name: torch.ones(each.shape, dtype=each.dtype)
            for name, each in self.state_dict().items()
        }
        self.load_state_dict(mapped(path, **tensors), assign=True)


@linux
@pytest.mark.parametrize("scheme", ["int4-g64", "int3-g64"])
def test_loading_leaves_one_copy_and_peaks_at_one_layer_more(tmp_path: Any, scheme: str) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("nothing is converted")
    optimize(Layers(tmp_path / "first.safetensors", 1, scheme))  # loads libraries
    model = Layers(tmp_path / "x.safetensors", 16, scheme)
    meter, replaced = Meter("cpu"), ReplacedTensors()
    with meter.peak() as peak:
        before = meter.used()
        optimize(model, replaced=replaced)
        replaced.flush()
        resident = meter.used() - before
    stored = weight_bytes(model)
    assert stored > 30 * MIB
    noise, layer = 4 * MIB, 2048 * 2048 * 4
    assert resident <= 1.1 * stored + noise
    assert peak.grown <= 1.1 * stored + layer + noise


@linux
def test_pages_of_a_shared_file_are_dropped_and_keep_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "states"
    path.write_bytes(bytes(64 * MIB))
    states = torch.from_file(str(path), shared=True, size=16 * MIB, dtype=torch.float32)
    meter, expected = Meter("cpu"), torch.arange(16.0)
    states.view(-1, 16).copy_(expected)
    before = meter.used()
    drop_shared_pages(states[: 8 * MIB])
    assert before - meter.used() > 28 * MIB
    assert bool((states.view(-1, 16) == expected).all())
    drop_shared_pages(expected)  # not in a file: nothing happens
    assert expected.tolist() == [*range(16)]
