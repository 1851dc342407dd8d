"""Compiling at run time: what is said where it is not possible, and files that belong together."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.kernels import cuda_device, nvrtc


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def problem(monkeypatch: pytest.MonkeyPatch, probe: Any) -> str | None:
    monkeypatch.setattr(nvrtc, "probe", probe)
    found: str | None = cuda_device.cuda_problem.__wrapped__(0)
    return found


def test_a_device_that_runs_kernels_has_no_problem(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem(monkeypatch, lambda _: True) is None


def test_wrong_results_and_failures_are_reasons_with_a_remedy(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> bool:
        raise nvrtc.CompilationError("cannot load NVRTC\nand more")

    assert "update the driver" in str(problem(monkeypatch, lambda _: False))
    text = str(problem(monkeypatch, fail))
    assert "cannot compile or launch a kernel (CompilationError: cannot load NVRTC)" in text
    assert "install a torch for the CUDA version of the driver" in text


def test_a_gpu_that_is_too_old_is_named_before_anything_is_compiled(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    text = str(problem(monkeypatch, lambda _: 1 / 0))
    assert "cuda:0 (Tesla T4) has compute capability 7.5, and the kernels need 8.0" in text


def test_a_missing_library_is_named() -> None:
    with pytest.raises(nvrtc.CompilationError, match=r"cannot load it: tried libnothing\.so\.1"):
        nvrtc._library(["libnothing.so.1"], "it")


def test_sources_include_only_files_beside_them() -> None:
    sources = sorted(nvrtc.FOLDER.iterdir())
    assert {path.suffix for path in sources} == {".cu", ".cuh"}
    for path in sources:
        for name in re.findall(r"#include\s+(\S+)", path.read_text()):
            assert (nvrtc.FOLDER / name.strip('"')).is_file(), f"{path.name} includes {name}"


def test_all_sources_that_are_launched_exist() -> None:
    folder = Path(nvrtc.__file__).parent
    named = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r'"(\w+\.cu)"', path.read_text())
    }
    assert named == {path.name for path in nvrtc.FOLDER.glob("*.cu")}
