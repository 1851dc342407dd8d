"""The table of fast products: one name in `MODULES` switches an implementation on."""

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
    monkeypatch.setattr(module, "triton_problem", lambda device: "no GPU here")
    assert select(need) == "Triton: no GPU here"
    monkeypatch.setattr(module, "triton_problem", lambda device: None)
    assert select(need) in module.ENTRIES
