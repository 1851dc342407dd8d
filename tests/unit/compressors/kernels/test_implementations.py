"""The table of fast products: one name in `MODULES` switches an implementation on."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from lrc.compressors.kernels import Need, implementations, select
from lrc.compressors.kernels.implementations import MODULES

NEEDS = {
    "packed_linear": Need("packed_linear", 4, torch.device("cuda"), torch.bfloat16, (64, 64), 32),
    "pivoted": Need("pivoted_rows", "float", torch.device("cuda"), torch.bfloat16, (64, 64)),
    "masked": Need("masked_linear", "float", torch.device("cuda"), torch.bfloat16, (64, 64)),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_name_in_modules_switches_kernels_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need = NEEDS[name]
    others = tuple(module for module in MODULES if module != name)
    monkeypatch.setattr(implementations, "MODULES", others)
    assert select(need) == f"{need.operation} has no fast path on cuda"
    monkeypatch.setattr(implementations, "MODULES", (*others, name))
    module = import_module(f"lrc.compressors.kernels.{name}")
    problem = "cuda_problem" if name == "packed_linear" else "triton_problem"
    monkeypatch.setattr(module, problem, lambda device: "no GPU here")
    assert select(need) == f"{module.ENTRIES[0].name}: no GPU here"
    monkeypatch.setattr(module, problem, lambda device: None)
    assert select(need) in module.ENTRIES


def test_integers_in_float32_on_a_gpu_name_the_types_that_have_kernels() -> None:
    need = replace(NEEDS["packed_linear"], dtype=torch.float32)
    assert select(need) == "CUDA: needs bfloat16 or float16, and the weights are in float32"
