"""A saved tiny Llama of three layers, and plans for models of which there are shapes alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lrc.compressors.models.architecture import Architecture, Linear, build
from lrc.compressors.models.source import Source, locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.compile import compile_plan
from lrc.compressors.planning.plan import Plan
from lrc.compressors.stages import STAGES
from lrc.configs.recipe import Model, Recipe

SHAPES = {"attn.q_proj": (64, 64), "attn.k_proj": (16, 64), "mlp.up_proj": (96, 64), "tiny": (2, 2)}


@pytest.fixture
def source(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def architecture(source: Path) -> Architecture:
    return build(locate(Model(path=str(source), dtype="float32")))


@pytest.fixture
def reader(source: Path, architecture: Architecture) -> WeightReader:
    return WeightReader(source, architecture)


class Skeleton(nn.Module):
    """Some layers of linears on the meta device; all that a plan looks at."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = LlamaConfig()
        self.embed = nn.Embedding(100, 64, device="meta", dtype=torch.bfloat16)
        for layer in range(layers):
            for name, (d_out, d_in) in SHAPES.items():
                module = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16)
                self.add_module(f"layers_{layer}_{name}".replace(".", "_"), module)

    def get_decoder(self) -> nn.Module:
        return self


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    def plan(
        *stages: dict[str, Any],
        layers: int = 2,
        other: Mapping[str, tuple[int, int]] | None = None,
        **calibration: int,
    ) -> Plan:
        """Plan for a model of equal layers; `other` are shapes by name that some have instead.

        Stages are options of ``decompose``, svd by default, or ``{"quantize": options}``.
        """
        linears = []
        for layer in range(layers):
            for leaf, shape in SHAPES.items():
                name = f"layers.{layer}.{leaf}"
                linears.append(Linear(name, layer, *(other or {}).get(name, shape), bias=False))
        names = [f"layers.{layer}" for layer in range(layers)]
        architecture = Architecture(Skeleton(layers), names, linears, {})
        recipe = Recipe.model_validate(
            {
                "model": "m",
                "stages": [
                    stage if "quantize" in stage else {"decompose": {"method": "svd", **stage}}
                    for stage in stages
                ],
                "calibration": calibration,
                "output": "o",
            }
        )
        source = Source(Model(path="m"), Path("m"), LlamaConfig(), weights_local=False)
        return compile_plan(recipe, source, architecture, STAGES).plan

    return plan
