"""Slicing, low rank and quantization in one recipe: shapes compose, and the result is one model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lrc.compressors.checkpoint.reader import load_checkpoint
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

KFAC = {"decompose": {"method": "kfac", "keep": 0.8}}
INT8 = {"quantize": {"method": "gptq", "bits": 8}}
SLICES = {
    "drop": {"method": "drop", "keep": 0.9},
    "modegpt": {"method": "modegpt", "keep": 0.9, "heads": False},
    "modegpt by layer": {"method": "modegpt", "keep": 0.9, "heads": False, "uniform": False},
}


CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{f"{name}, integers": (name, [INT8]) for name in SLICES},
    # Shapes that differ from layer to layer are the hardest for what follows.
    "modegpt by layer, low rank, integers": ("modegpt by layer", [KFAC, INT8]),
}


@pytest.mark.parametrize(("name", "stages"), CASES.values(), ids=CASES)
def test_slices_are_decomposed_and_quantized(
    name: str,
    stages: list[dict[str, Any]],
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder, output = tmp_path / "model", tmp_path / "run"
    tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=4).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    path = tiny_recipe(folder, output, stages=[{"slice": SLICES[name]}, *stages])
    report = compress(load_recipe(path), Machine("cpu"))
    before, after = report["slices"][0]["bytes"]
    assert after <= 0.9 * before
    assert all(
        component["quantization"] == "int8"
        for layer in report["layers"]
        for component in layer["config"]["components"]
    )
    assert report["size"]["targeted"]["kept"] < 0.55
    model = load_checkpoint(output / "checkpoint", dtype=torch.float32)
    plain = name != "modegpt by layer" and stages == [INT8]
    manifest = json.loads((output / "checkpoint/lrc/manifest.json").read_text())
    assert manifest["plain"] == plain
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert written.shape[1] <= 7
