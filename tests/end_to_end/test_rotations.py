"""SliceGPT with one basis per block, from a recipe to a checkpoint that lrc loads."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.fresh_processes import FreshProcesses
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from lrc.compressors.calibrate.layer_calls import watch
from lrc.compressors.calibrate.residual_writers import find_writers
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe

SLICE = {"slice": {"method": "slicegpt", "keep": 0.9, "rotations": "block", "width_multiple": 1}}
NORM = "model.layers.0.input_layernorm"
TOKENS = torch.arange(2, 30)[None]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Rotated:
    """A finished run, and a function that writes similar recipes."""

    recipe: Callable[..., Path]
    output: Path
    report: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.fixture(scope="module")
def rotated(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tiny_recipe: Callable[..., Path],
) -> Rotated:
    folder = tmp_path_factory.mktemp("rotated")
    tiny_llama().save_pretrained(folder / "source")
    make_tokenizer().save_pretrained(folder / "source")

    def recipe(output: Path, *stages: dict[str, Any]) -> Path:
        return tiny_recipe(folder / "source", output, stages=[*stages])

    report = compress(load_recipe(recipe(folder / "run", SLICE)))
    return Rotated(recipe, folder / "run", report)


def test_the_budget_is_kept_shortcuts_included(rotated: Rotated) -> None:
    dense, small = rotated.report["slices"][0]["bytes"]
    tensors = load_file(rotated.checkpoint / "model.safetensors")
    assert sum(t.numel() * t.itemsize for t in tensors.values()) == small <= 0.9 * dense
    k = rotated.report["slices"][0]["facts"]["width"]
    assert 16 < k < 32
    assert tensors[f"{NORM}.shortcut"].shape == (k, 32 - k)
    energies = rotated.report["slices"][0]["facts"]["stream_energy_kept"]
    assert len(energies) == 5  # before each of four blocks, and before the head
    assert 0.5 < min(energies) <= max(energies) < 1


def test_generation_is_the_same_with_and_without_a_cache(rotated: Rotated) -> None:
    model = load(rotated.checkpoint)
    cached, plain = (
        model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_parts_may_be_offloaded_to_disk(rotated: Rotated, tmp_path: Path) -> None:
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    device_map = dict.fromkeys([*names, "model.layers.1"], "cpu") | {"model.layers.0": "disk"}
    model = load(rotated.checkpoint, device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(logits(model), logits(load(rotated.checkpoint)))


def test_a_copy_returns_the_same(rotated: Rotated) -> None:
    model = load(rotated.checkpoint)
    assert torch.equal(logits(deepcopy(model)), logits(model))


def test_without_lrc_loading_stops(rotated: Rotated, without_lrc: FreshProcesses) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        "A.from_pretrained(sys.argv[1])"
    )
    done = without_lrc(code, rotated.checkpoint)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


def test_dequantizing_is_refused(rotated: Rotated) -> None:
    with pytest.raises(CheckpointError, match=r"cannot dequantize.*rotations: global"):
        load(rotated.checkpoint).dequantize()


def test_a_decomposition_continues_from_the_slice(rotated: Rotated, tmp_path: Path) -> None:
    factors = {"decompose": {"method": "kfac", "keep": 0.9, "compensate": {}}}
    report = compress(load_recipe(rotated.recipe(tmp_path / "run", SLICE, factors)))
    shapes = {record["name"]: record["config"]["shape"] for record in report["layers"]}
    k = report["slices"][0]["facts"]["width"]
    assert shapes["model.layers.0.mlp.down_proj"] == [k, 48]
    assert torch.isfinite(logits(load(tmp_path / "run/checkpoint"))).all()


def test_shortcuts_are_not_part_of_the_output_of_a_linear(rotated: Rotated) -> None:
    """Neither in statistics nor in the search for linears that write to the stream.

    The output of attention passes through the shortcut of the MLP, which changes it.
    """
    model, seen = load(rotated.checkpoint), {}
    layer, prefix = model.model.layers[0], "model.layers.0"
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    x = model.model.embed_tokens(TOKENS)
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])

    def forward() -> torch.Tensor:
        found: torch.Tensor = layer(x, position_embeddings=rotary)
        return found

    def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[name] = (x, y)

    with watch(model, [f"{prefix}.mlp.down_proj"], see), torch.no_grad():
        forward()
    (x_seen, y_seen) = seen[f"{prefix}.mlp.down_proj"]
    torch.testing.assert_close(y_seen, x_seen @ linears["mlp.down_proj"].weight.T)
    assert find_writers(forward, [*linears.items()]) == ["mlp.down_proj"]


def test_biases_of_layer_norms_move_to_the_linears_after_them(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = OPTConfig(
        vocab_size=512,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        tie_word_embeddings=False,
        init_std=0.2,
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    compress(load_recipe(tiny_recipe(tmp_path / "opt", tmp_path / "run", stages=[SLICE])))
    model = load(tmp_path / "run/checkpoint")
    assert model.lm_head.bias is not None
    assert torch.isfinite(logits(model)).all()


def spoil(rotated: Rotated, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(rotated.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "norms a list": ({"norms": [1]}, "norms must map names"),
    "a norm without a rank": ({"norms": {NORM: {"writer": "a"}}}, "'rank': N >= 1"),
    "a norm that is none": ({"norms": {"lm_head": {}}}, "'lm_head', which is not a norm"),
    "a writer that is none": (
        {"norms": {NORM: {"writer": "model.norm", "rank": 3}}},
        "lists 'model.norm', not a linear",
    ),
    "another rank": (
        {"norms": {NORM: {"writer": "model.layers.0.self_attn.o_proj", "rank": 1}}},
        "shortcut: expected",
    ),
    "biases a mapping": ({"biases": {}}, "biases must be a list"),
    "a bias of a number": ({"biases": [1]}, "biases[0] must be the name"),
    "a bias of a norm": ({"biases": ["model.norm"]}, "not a linear layer without bias"),
    "a bias that is not there": ({"biases": ["lm_head"]}, "lm_head.bias: expected [512]"),
}


@pytest.mark.parametrize("case", BAD)
def test_tables_that_do_not_match_are_refused(rotated: Rotated, tmp_path: Path, case: str) -> None:
    change, words = BAD[case]
    folder = spoil(rotated, tmp_path / "bad", lambda block: block.update(change))
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    assert words in str(refused.value)
