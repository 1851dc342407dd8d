"""Slicing stages from a recipe to plain checkpoints, alone and before a decomposition."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fresh_processes import FreshProcesses
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lrc.cli.inspect import describe
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress, measure
from lrc.compressors.prepare import prepare
from lrc.compressors.slicing import slices
from lrc.compressors.stages import STAGES
from lrc.configs.errors import ModelError, RecipeError, Stopped
from lrc.configs.load import load_recipe

N_LAYERS, IDLE = 5, (1, 3)
DROP = {"method": "drop", "keep": 0.8}  # three of the five layers


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Path:
    """Write a model with two layers that do nothing."""
    folder = tmp_path_factory.mktemp("idle")
    model = tiny_llama(num_hidden_layers=N_LAYERS)
    with torch.no_grad():
        for index in IDLE:
            layer = model.model.layers[index]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path, tiny_recipe: Callable[..., Path]) -> Callable[..., Any]:
    def load(output: Path, *stages: dict[str, Any], **changes: Any) -> Any:
        return load_recipe(tiny_recipe(source, output, stages=[*stages], **changes))

    return load


def load(folder: Path) -> Any:
    """Load a model at the recipe's precision, and let it run in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()


def logits(folder: Path) -> torch.Tensor:
    model = load(folder)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2, 30)[None]).logits
    return found


def test_layers_that_do_nothing_are_removed_first_and_without_loss(
    prepared: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    report = compress(prepared(tmp_path / "run", {"slice": DROP}))
    assert report["slices"][0]["facts"]["dropped"] == [*IDLE]
    torch.testing.assert_close(logits(tmp_path / "run/checkpoint"), logits(source))


def test_layers_whose_removal_costs_least_loss_are_removed(
    prepared: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    report = compress(prepared(tmp_path / "run", {"slice": DROP | {"criterion": "perplexity"}}))
    facts = report["slices"][0]["facts"]
    tokens = load_file(tmp_path / "run/work/windows.safetensors")["tokens"]
    model = load(source)
    layers, kept = model.model.layers, [*range(N_LAYERS)]

    def loss(without: int) -> float:
        model.model.layers = torch.nn.ModuleList(layers[i] for i in kept if i != without)
        model.config.num_hidden_layers = len(model.model.layers)
        with torch.no_grad():
            return float(model(tokens, labels=tokens, use_cache=False).loss)

    for expected in facts["losses"]:
        found = {layer: loss(layer) for layer in kept}
        best = min(found, key=lambda layer: found[layer])
        assert found[best] == pytest.approx(expected, rel=1e-5)
        kept.remove(best)
    assert facts["dropped"] == [layer for layer in range(N_LAYERS) if layer not in kept]


def test_influence_of_a_layer_that_does_nothing_is_zero(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    influence = compress(prepared(tmp_path / "run", {"slice": DROP}))["slices"][0]["facts"]
    found = torch.tensor(influence["influence"])
    assert found[list(IDLE)].abs().max() < 1e-5 < found[[0, 2, 4]].min()


def test_the_budget_is_of_the_whole_model_and_is_kept(
    prepared: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    report = compress(prepared(tmp_path / "run", {"slice": DROP}))
    dense, small = (report["size"]["model"]["file_bytes"][k] for k in ("dense", "compressed"))
    tensors = report["slices"][0]["bytes"]
    assert tensors[0] == dense
    assert tensors[1] <= 0.8 * dense < tensors[1] + dense // N_LAYERS
    assert 0 <= small - tensors[1] < 8000  # the header of the file
    assert report["size"]["targeted"] == {
        "bits": 0,
        "dense_bits": 0,
        "kept": 1.0,
        "removed": 0.0,
    }
    assert report["calibration"]["tokens"] > 0


def test_a_plain_checkpoint_needs_no_lrc(
    prepared: Callable[..., Any], tmp_path: Path, without_lrc: FreshProcesses
) -> None:
    compress(prepared(tmp_path / "run", {"slice": DROP}))
    folder = tmp_path / "run/checkpoint"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1])\n"
        "print(model.generate(torch.tensor([[5, 6]]), max_new_tokens=4).shape[1])"
    )
    done = without_lrc(code, folder)
    assert done.returncode == 0, done.stderr
    assert 2 < int(done.stdout) <= 6
    facts = describe(folder, verify=True)
    assert (facts["modules"], facts["slices"][0]["method"]) == ([], "drop")
    assert "lrc is not needed" in (folder / "README.md").read_text()


def test_a_decomposition_works_on_what_the_slice_leaves(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    stages = {"slice": DROP}, {"decompose": {"method": "kfac", "keep": 0.8, "compensate": {}}}
    loaded = prepared(tmp_path / "run", *stages)
    report = compress(loaded)
    layers = {record["name"].split(".")[2] for record in report["layers"]}
    assert layers == {"0", "1", "2"}
    whole = report["size"]["model"]
    assert whole["parameters"]["compressed"] < report["slices"][0]["parameters"][1]
    assert whole["parameters"]["dense"] == report["slices"][0]["parameters"][0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
    assert len(model.model.layers) == 3
    assert measure(loaded).plan.slices[0].parameters[1] == report["slices"][0]["parameters"][1]


def test_a_slice_starts_from_the_result_of_the_one_before(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    """The rotary table of narrower heads comes from calibration; a later stage must keep it."""
    narrow = {"slice": {"method": "modegpt", "keep": 0.6, "width_multiple": 2}}
    rotate = {"slice": {"method": "slicegpt", "keep": 0.8}}
    decompose = {"decompose": {"method": "svd-llm", "keep": 0.9}}
    loaded = prepared(tmp_path / "run", narrow, rotate, decompose)
    tables = []

    def look(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done == 1:
            for number in (0, 1):
                text = (tmp_path / f"run/work/sliced-{number}/config.json").read_text()
                tables.append(json.loads(text)["rope_parameters"])

    report = compress(loaded, Machine(device="cpu", on_step=look))
    first, second = report["slices"]
    assert first["config"]["head_dim"][1] < 8
    assert tables[0]["rope_type"] == "longrope"
    assert tables[1] == tables[0]
    assert first["config"]["rope_parameters"][1]["short_factor"] == tables[0]["short_factor"]
    assert "rope_parameters" not in second["config"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
    assert model.config.rope_parameters["short_factor"] == tables[0]["short_factor"]
    assert torch.isfinite(model(torch.arange(2, 30)[None]).logits).all()


def test_narrower_heads_are_not_narrowed_again(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    narrow = {"slice": {"method": "modegpt", "keep": 0.6, "width_multiple": 2}}
    again = {"slice": {"method": "modegpt", "keep": 0.985, "width_multiple": 2}}
    first, second = compress(prepared(tmp_path / "run", narrow, again))["slices"]
    assert first["config"]["head_dim"][1] < 8
    assert "head_dim" not in second["config"]
    assert second["config"]["intermediate_size"][1] < first["config"]["intermediate_size"][1]
    assert torch.isfinite(logits(tmp_path / "run/checkpoint")).all()


def test_weights_may_be_shards(
    prepared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(prepared(tmp_path / "one", {"slice": DROP}))
    monkeypatch.setattr(slices, "MAX_SHARD_BYTES", 20_000)  # the embedding alone takes 32,768
    compress(prepared(tmp_path / "many", {"slice": DROP}))
    torch.testing.assert_close(
        logits(tmp_path / "many/checkpoint"), logits(tmp_path / "one/checkpoint"), rtol=0, atol=0
    )


def test_weights_that_are_not_finite_are_named(
    source: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(source, spoiled)
    weights = load_file(spoiled / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] *= 1e30
    weights["model.layers.2.mlp.gate_proj.weight"] *= 1e30
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    loaded = load_recipe(tiny_recipe(spoiled, tmp_path / "run", stages=[{"slice": DROP}]))
    with pytest.raises(ModelError, match=r"not finite .* in model\.layers\.2"):
        compress(loaded)


def test_few_tokens_for_many_channels_give_a_warning(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    stage = {"slice": {"method": "modegpt", "keep": 0.8}}
    calibration = {"source": "python-docs", "samples": 2, "length": 64}
    few = prepare(prepared(tmp_path / "run", stage, calibration=calibration).recipe, STAGES)
    (warning,) = few.plan.warnings
    assert warning.startswith("calibration: 128 tokens are few for modegpt; 384 or more")
    enough = calibration | {"samples": 6}
    loaded = prepared(tmp_path / "run", stage, calibration=enough)
    assert not prepare(loaded.recipe, STAGES).plan.warnings


def test_two_slices_follow_each_other(prepared: Callable[..., Any], tmp_path: Path) -> None:
    half = {"slice": {"method": "drop", "keep": 0.9}}
    report = compress(prepared(tmp_path / "run", half, half))
    first, second = report["slices"]
    assert first["config"] == {
        "num_hidden_layers": [5, 4]
    }  # neither precision nor path has changed
    assert second["config"] == {"num_hidden_layers": [4, 3]}
    assert first["parameters"][1] == second["parameters"][0]


def test_a_run_that_was_stopped_continues_after_the_slice(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    stages = {"slice": DROP}, {"decompose": {"method": "svd-llm", "keep": 0.8}}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress":
            raise Stopped("here")

    loaded = prepared(tmp_path / "run", *stages)
    with pytest.raises(Stopped):
        compress(loaded, Machine(device="cpu", on_step=stop))
    seen: list[str] = []
    compress(loaded, Machine(device="cpu", on_step=lambda stage, *_: seen.append(stage)))
    assert "slice" not in seen
    undisturbed = prepared(tmp_path / "other", *stages)
    compress(undisturbed)
    one, other = (
        (tmp_path / name / "checkpoint/model.safetensors").read_bytes() for name in ("run", "other")
    )
    assert one == other


@pytest.mark.parametrize(
    ("stages", "code", "words"),
    [
        (
            [{"slice": DROP | {"keep": 0.1}}],
            "invalid-recipe",
            ["stages[0].slice.keep", "at least 0."],
        ),
        (
            [{"slice": DROP | {"keep": 1}}],
            "invalid-recipe",
            ["stages[0].slice.keep", "nothing would be"],
        ),
        ([{"slice": {"method": "drop"}}], "conflicting-keys", ["stages[0].slice", "neither"]),
        ([{"slice": DROP | {"size": "1MiB"}}], "conflicting-keys", ["stages[0].slice", "both"]),
        (
            [{"slice": {"method": "drop", "size": "9GiB"}}],
            "invalid-recipe",
            ["slice.size", "lower size"],
        ),
        ([{"slice": DROP | {"method": "dorp"}}], "unknown-value", ["did you mean 'drop'?"]),
        ([{"slice": DROP, "decompose": {}}], "misplaced-key", ["stages[0].decompose", "'slice'"]),
        (
            [{"decompose": {"method": "svd", "keep": 0.5}}, {"slice": DROP}],
            "conflicting-keys",
            ["before every 'decompose'", "stages[1]", "move it to the front"],
        ),
    ],
)
def test_what_cannot_be_sliced_is_refused_in_the_plan(
    stages: list[dict[str, Any]],
    code: str,
    words: list[str],
    prepared: Callable[..., Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError) as refused:
        compress(prepared(tmp_path / "run", *stages))
    assert refused.value.code == code
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [["--sensitivity"], ["--profile", "1"]])
def test_a_recipe_that_only_slices_has_no_sensitivity(
    option: list[str], lrc: Callable[..., Any], source: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    recipe = tiny_recipe(source, tmp_path / "run", stages=[{"slice": DROP}])
    lrc("plan", recipe, *option).refuses(2, "'decompose'", where="--sensitivity")
    shown = lrc("plan", recipe)
    assert shown.code == 0
    assert "num_hidden_layers 5 -> 3" in shown.out
    assert "decompose" not in shown.out
