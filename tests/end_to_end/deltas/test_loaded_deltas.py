"""Deltas of tiny models and adapters that are loaded: switching, and adapters of PEFT."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_deltas import METHODS, load, logits_of
from transformers import AutoModelForCausalLM

import lrc as package
from lrc.configs.errors import DeltaError

# PEFT asks for an attribute that the newest transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def two_deltas(make: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    make("tuned", tmp_path / "full", "ternary", "density=0.2")
    make("adapter", tmp_path / "lora", "int", "bits=8")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_restores_the_base_bit_by_bit(
    dtype: torch.dtype, two_deltas: Path, models: Path, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    base = models / "base"
    if dtype != torch.float32:
        base = tmp_path / "base"
        load(models / "base").to(dtype).save_pretrained(base)
        for name in ("full", "lora"):
            shutil.rmtree(two_deltas / name)
        for name, tuned in (("full", "tuned"), ("lora", "adapter")):
            done = lrc("delta", "make", base, models / tuned, two_deltas / name, "-q")
            assert done.code == 0, done.err
    # A base in bfloat16 may also run in float32.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deltas = package.load_delta(model, two_deltas / "full", name="full")
    with_full = logits_of(model)
    deltas.add("lora", two_deltas / "lora")
    assert torch.equal(logits_of(model), with_full)
    deltas.activate("lora")
    with_lora = logits_of(model)
    deltas.activate("full")
    assert torch.equal(logits_of(model), with_full)
    assert not torch.equal(with_lora, with_full)
    deltas.deactivate()
    assert deltas.active is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    deltas.activate("lora")
    assert torch.equal(logits_of(model), with_lora)


def test_names_of_loaded_deltas_are_checked(
    make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    make("tuned", tmp_path / "delta", "ternary")
    deltas = package.LoadedDeltas(load(models / "base"))
    deltas.add("a", tmp_path / "delta")
    with pytest.raises(DeltaError, match="has been added already"):
        deltas.add("a", tmp_path / "delta")
    with pytest.raises(DeltaError, match=r"must be the name of a delta.*one of a"):
        deltas.activate("b")


@pytest.mark.parametrize("method", ["ternary", "int", "sparse", "low-rank"])
def test_peft_loads_the_adapter(
    method: str,
    make: Callable[..., dict[str, Any]],
    lrc: Callable[..., Any],
    models: Path,
    tmp_path: Path,
) -> None:
    options = ["rank=2"] if method == "low-rank" else METHODS[method]
    facts = make("adapter", tmp_path / "delta", method, *options)
    numbers = sum(
        t.numel() for t in load_file(models / "adapter/adapter_model.safetensors").values()
    )
    assert facts["sizes"]["numbers"] == numbers
    done = lrc("delta", "apply", models / "base", tmp_path / "delta", tmp_path / "out")
    assert done.code == 0, done.err
    adapted = peft.PeftModel.from_pretrained(load(models / "base"), tmp_path / "out").eval()
    model = load(models / "base")
    deltas = package.load_delta(model, tmp_path / "delta")
    torch.testing.assert_close(logits_of(model), logits_of(adapted), rtol=0, atol=1e-4)
    deltas.deactivate()
    assert not torch.allclose(logits_of(model), logits_of(adapted), atol=1e-2)


def test_an_adapter_of_its_own_rank_keeps_its_products_and_scaling(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    facts = make("adapter", tmp_path / "delta", "low-rank", "keep=1", "dtype=float32")
    assert facts["sizes"]["relative_error"] < 1e-6
    lrc("delta", "apply", models / "base", tmp_path / "delta", tmp_path / "out")
    base = load(models / "base")
    expected = logits_of(peft.PeftModel.from_pretrained(base, models / "adapter").eval())
    found = logits_of(
        peft.PeftModel.from_pretrained(load(models / "base"), tmp_path / "out").eval()
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
