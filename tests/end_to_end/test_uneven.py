"""MLPs with a different width in every layer: slices that need lrc to be loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.fresh_processes import FreshProcesses
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lrc.cli.inspect import describe
from lrc.compressors.io.machine import Machine
from lrc.compressors.io.shards import read_headers
from lrc.compressors.pipeline import compress, measure
from lrc.compressors.planning.summary import summarize
from lrc.configs.errors import CheckpointError, RecipeError, Stopped
from lrc.configs.load import load_recipe

WIDTH, IDLE = 48, (40, 8)  # channels of each layer that are never read
SLICE = {
    "method": "modegpt",
    "uniform": False,
    "allocation": "lagrangian",
    "heads": False,
    "width_multiple": 2,
    "damp": 1e-8,
}
EVAL = ("--perplexity", "python-docs", "--window", 32, "--windows", 1, "-q")
TOKENS = torch.arange(2, 30)[None]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Uneven:
    """A model whose layers have different numbers of unused channels, and its slice."""

    source: Path
    recipe: Callable[..., Path]
    output: Path
    report: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint"

    def load(self, **options: Any) -> Any:
        return load(self.checkpoint, **options)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def keeping(channels: int) -> float:
    """Return the fraction of the tiny model's bytes with so many channels in all MLPs together."""
    dense = 512 * 32 * 2 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * WIDTH + 2 * 32) + 32
    return (dense - (2 * WIDTH - channels) * 3 * 32 + 1) / dense


@pytest.fixture(scope="module")
def uneven(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tiny_recipe: Callable[..., Path],
) -> Uneven:
    folder = tmp_path_factory.mktemp("uneven")
    model = tiny_llama()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer, idle in zip(model.model.layers, IDLE, strict=True):
            layer.mlp.down_proj.weight[:, order[:idle]] = 0
    model.save_pretrained(folder / "source")
    make_tokenizer().save_pretrained(folder / "source")

    def recipe(output: Path, *stages: dict[str, Any], **changes: Any) -> Path:
        dtype = {"model": {"path": str(folder / "source"), "dtype": "float32"}}
        return tiny_recipe(folder / "source", output, stages=[*stages], **dtype, **changes)

    stage = {"slice": SLICE | {"keep": keeping(48)}}
    report = compress(load_recipe(recipe(folder / "run", stage)))
    return Uneven(folder / "source", recipe, folder / "run", report)


def test_unused_channels_are_removed_from_every_layer_without_loss(uneven: Uneven) -> None:
    facts = uneven.report["slices"][0]["facts"]
    assert facts["intermediate_size"] == [WIDTH, [WIDTH - idle for idle in IDLE]]
    torch.testing.assert_close(
        logits(uneven.load()), logits(load(uneven.source)), rtol=1e-3, atol=1e-4
    )


def test_the_config_is_that_of_the_architecture_with_a_table_of_shapes(uneven: Uneven) -> None:
    config = json.loads((uneven.checkpoint / "config.json").read_text())
    assert config["intermediate_size"] == WIDTH
    block = config["quantization_config"]
    assert (block["quant_method"], block["format_version"], block["modules"]) == ("lrc", 2, {})
    assert block["shapes"]["model.layers.0.mlp.down_proj"] == [32, 8]
    headers = read_headers([uneven.checkpoint / "model.safetensors"])
    assert {n: headers[f"{n}.weight"].shape for n in block["shapes"]} == block["shapes"]
    assert uneven.report["slices"][0]["config"] == {"shapes": [None, block["shapes"]]}
    facts = describe(uneven.checkpoint, verify=True)
    assert facts["shapes"] == block["shapes"]
    card = (uneven.checkpoint / "README.md").read_text()
    assert "import lrc" in card
    assert "lrc is not needed" not in card


def test_stored_bytes_are_those_of_the_plan(uneven: Uneven) -> None:
    headers = read_headers([uneven.checkpoint / "model.safetensors"]).values()
    stored = sum(4 * prod(header.shape) for header in headers)
    dense, small = uneven.report["slices"][0]["bytes"]
    assert stored == small <= keeping(48) * dense < small + 3 * 32 * 4 * 2


def test_generation_is_the_same_with_and_without_a_cache(uneven: Uneven) -> None:
    model = uneven.load()
    cached, plain = (
        model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_saving_and_loading_change_nothing(uneven: Uneven, tmp_path: Path) -> None:
    model = uneven.load()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_dequantized_it_is_a_plain_model_with_the_same_outputs(
    uneven: Uneven, tmp_path: Path
) -> None:
    model = uneven.load()
    expected = logits(model)
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in config
    dense = load(tmp_path / "dense")
    assert dense.model.layers[0].mlp.up_proj.weight.shape == (WIDTH, 32)
    torch.testing.assert_close(logits(dense), expected)


def test_parts_may_be_offloaded_to_disk(uneven: Uneven, tmp_path: Path) -> None:
    device_map = dict.fromkeys(
        ["model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm", "lm_head"], "cpu"
    ) | {"model.layers.0": "disk"}
    model = uneven.load(device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(logits(model), logits(uneven.load()))


def test_without_lrc_loading_stops(uneven: Uneven, without_lrc: FreshProcesses) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        "A.from_pretrained(sys.argv[1])"
    )
    done = without_lrc(code, uneven.checkpoint)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


TABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": ([1], ("shapes must map names",)),
    "no shape": ({"lm_head": 5}, ("shapes['lm_head'] must be [d_out, d_in]", "got 5")),
    "a size of nothing": ({"lm_head": [0, 32]}, ("shapes['lm_head'] must be", ">= 1")),
    "half a size": ({"lm_head": [1.5, 32]}, ("shapes['lm_head'] must be",)),
    "three sizes": ({"lm_head": [1, 2, 3]}, ("shapes['lm_head'] must be",)),
}
MISMATCHES: dict[str, tuple[dict[str, list[int]], tuple[str, ...], str]] = {
    "unknown": (
        {"model.layers.7.mlp.up_proj": [8, 32]},
        ("layers.7.mlp.up_proj", "not a linear"),
        "found nothing",
    ),
    "no linear": ({"model.norm": [8, 32]}, ("model.norm is not a linear layer",), "found [32]"),
    "wider": (
        {"model.layers.0.mlp.up_proj": [49, 32]},
        ("must be at most", "got [49, 32]"),
        "found [8, 32]",
    ),
    "not the file's": (
        {"model.layers.0.mlp.up_proj": [9, 32]},
        ("expected [9, 32]", "found [8"),
        "found [8, 32]",
    ),
}


def spoiled(uneven: Uneven, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(uneven.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", TABLE)
def test_invalid_tables_are_refused(
    uneven: Uneven, lrc: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    table, words = TABLE[case]
    folder = spoiled(uneven, tmp_path / "bad", lambda block: block.update(shapes=table))
    lrc("inspect", folder).refuses(1, str(folder), *words, code="invalid-checkpoint")
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_table_of_another_model_is_refused(
    uneven: Uneven, lrc: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    table, words, found = MISMATCHES[case]
    folder = spoiled(uneven, tmp_path / "bad", lambda block: block["shapes"].update(table))
    for command in (("eval", folder, *EVAL), ("inspect", folder)):
        lrc(*command).refuses(1, str(folder), found, code="tensor-mismatch")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in words)


def test_the_plan_shows_what_is_pending_and_the_total_size(
    uneven: Uneven, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = uneven.recipe(tmp_path / "run", {"slice": SLICE | {"keep": keeping(48)}})
    shown = lrc("plan", recipe)
    assert shown.code == 0
    assert "pending: the lagrangian allocation will choose the width of each" in shown.out
    planned = json.loads(lrc("plan", recipe, "--json").out)["slices"][0]
    assert planned["bytes"] == uneven.report["slices"][0]["bytes"]
    assert {min(shape) for shape in planned["config"]["shapes"][1].values()} == {24}


@pytest.mark.parametrize("allocation", ["influence", "lagrangian"])
def test_heads_and_a_decomposition_go_with_it(
    uneven: Uneven, allocation: str, tmp_path: Path
) -> None:
    narrow = {"slice": SLICE | {"keep": 0.8, "heads": True, "allocation": allocation}}
    factors = {"decompose": {"method": "kfac", "keep": 0.8, "compensate": {}}}
    loaded = load_recipe(uneven.recipe(tmp_path / "run", narrow, factors))
    report = compress(loaded)
    cut = report["slices"][0]
    widths = cut["facts"]["intermediate_size"][1]
    assert widths[0] != widths[1]
    assert cut["config"]["head_dim"][1] < 8
    assert cut["bytes"][1] <= 0.8 * cut["bytes"][0] < cut["bytes"][1] + 2 * 3 * 32 * 4
    shapes = {record["name"]: record["config"]["shape"] for record in report["layers"]}
    assert shapes["model.layers.1.mlp.up_proj"] == [widths[1], 32]
    folder = tmp_path / "run/checkpoint"
    stored = sum(t.numel() * t.itemsize for t in load_file(folder / "model.safetensors").values())
    plan = json.loads((folder / "lrc/plan.json").read_text())
    assert stored == plan["totals"]["compressed_bytes"]
    model = load(folder)
    expected = logits(model)
    assert torch.isfinite(expected).all()
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    facts = describe(folder, verify=True)
    assert facts["modules"]
    assert len(facts["shapes"]) == 6
    assert measure(loaded).plan.slices[0].bytes == tuple(cut["bytes"])


def test_a_run_that_was_stopped_continues_with_the_chosen_widths(
    uneven: Uneven, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    stages = {"slice": SLICE | {"keep": 0.9}}, {"decompose": {"method": "svd-llm", "keep": 0.8}}
    path = uneven.recipe(tmp_path / "run", *stages)
    loaded = load_recipe(path)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress":
            raise Stopped("here")

    planned = measure(loaded).plan
    with pytest.raises(Stopped):
        compress(loaded, Machine(device="cpu", on_step=stop))
    report = compress(loaded)
    shapes = {weight.name: [*weight.shape] for weight in summarize(planned)}
    assert {record["name"]: record["config"]["shape"] for record in report["layers"]} == shapes
    low, high = sorted(report["slices"][0]["facts"]["intermediate_size"][1])
    assert low < high
    shown = lrc("compress", path, "-q")
    assert f"intermediate_size {WIDTH} -> {low} to {high}" in shown.out


def test_nothing_is_sliced_after_pending_widths(uneven: Uneven, tmp_path: Path) -> None:
    first, second = {"slice": SLICE | {"keep": 0.9}}, {"slice": {"method": "drop", "keep": 0.85}}
    with pytest.raises(RecipeError, match=r"stages\[1\].slice: cannot follow stages\[0\]"):
        compress(load_recipe(uneven.recipe(tmp_path / "run", first, second)))
    compress(load_recipe(uneven.recipe(tmp_path / "turned", second, first)))
