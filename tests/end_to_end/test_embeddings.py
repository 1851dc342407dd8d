"""Embedding and head as integers: counted, stored, loaded, inspected, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lrc.compressors.checkpoint.reader import load_checkpoint
from lrc.compressors.compress import quantize_embeddings as embeddings
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import CompressedEmbedding, QuantizationArgs, TiedHead
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.configs.load import load_recipe

SCHEMES = ["int8", "int4-g16", "int3-g16", "int2-g16"]


def quantize(**options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **options}}


def mixed(**options: Any) -> dict[str, Any]:
    return {"decompose": {"method": "mixed", "schemes": SCHEMES, **options}}


DROP = {"slice": {"method": "drop", "keep": 0.8}}
BLOCKS = {"slice": {"method": "slicegpt", "keep": 0.9, "width_multiple": 1, "rotations": "block"}}
RECIPES: dict[str, tuple[bool, list[dict[str, Any]]]] = {
    "tied": (True, [quantize(embeddings="int8")]),
    "tied-alone": (True, [quantize(targets=[], embeddings="int4-g16-asymmetric")]),
    "apart": (False, [quantize(embeddings="int8", lm_head="int6")]),
    "head-alone": (False, [quantize(targets=[], lm_head="int8")]),
    "after-factors": (
        True,
        [
            {"decompose": {"method": "kfac", "size": "50KiB"}},
            quantize(targets=[], embeddings="int8"),
        ],
    ),
    "joint": (True, [mixed(size="72KiB", embeddings="int6-g16", compensate={})]),
    "joint-apart": (
        False,
        [mixed(keep=0.3, embeddings="int8", lm_head="int8", components=["dense"])],
    ),
    "dropped": (True, [DROP, quantize(bits=4, embeddings="int8")]),
    "rotated": (False, [BLOCKS, quantize(bits=8, embeddings="int8", lm_head="int8")]),
}
RECIPES["untied-by-a-slice"] = (
    True,
    [
        {"slice": {"method": "slicegpt", "keep": 0.9, "width_multiple": 1}},
        quantize(embeddings="int8", lm_head="int8"),
    ],
)
"""Whether the head is tied, and the stages."""
SLICED = ("dropped", "rotated", "untied-by-a-slice")


@pytest.fixture(scope="module")
def folders(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[bool, Path]:
    base, found = tmp_path_factory.mktemp("models"), {}
    for tied in (True, False):
        found[tied] = base / f"tied-{tied}"
        model = tiny_llama(tie_word_embeddings=tied, num_hidden_layers=5)
        model.save_pretrained(found[tied])
        make_tokenizer().save_pretrained(found[tied])
    return found


@pytest.fixture(scope="module")
def runs(
    folders: dict[bool, Path],
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Run a recipe once, and return its output folder."""
    base = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        output = base / name
        if not output.exists():
            tied, stages = RECIPES[name]
            path = tiny_recipe(folders[tied], output, stages=stages)
            compress(load_recipe(path, ["model.dtype=float32"]), Machine("cpu"))
        return output

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_counted_and_the_model_is_the_dense_one_of_the_stored_weights(
    name: str, runs: Callable[[str], Path], executed: Callable[[Path], Plan]
) -> None:
    checkpoint = runs(name) / "checkpoint"
    plan = executed(runs(name))
    report = json.loads((checkpoint / "lrc/report.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    sentinels = 1 if name == "head-alone" else 0  # a plain checkpoint has none
    counted = report["size"]["model"]["tensor_bytes"]["compressed"]
    if name not in SLICED:  # slices are counted separately
        assert stored + sentinels == counted
    baselines = report["size"]["baselines"]
    assert 0.15 * report["size"]["model"]["tensor_bytes"]["dense"] < min(baselines.values())
    model = load_checkpoint(checkpoint)
    quantized = {task.name: plan.results[task.name] for task in plan.embeddings}
    assert quantized.keys() <= {layer["name"] for layer in report["layers"]}
    assert all(0 < (result.relative_error or 0) < 0.05 for result in quantized.values())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = model(ids).logits
        if "model.embed_tokens" in quantized:
            assert isinstance(model.model.embed_tokens, CompressedEmbedding)
        if name == "rotated":
            return
        plain = model.dequantize() if name != "head-alone" else model
        assert not any(isinstance(m, CompressedEmbedding | TiedHead) for m in plain.modules())
        torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-4)


SCHEMES_OF = {"tied": "int8", "apart": "int8", "joint": "int6-g16"}


@pytest.mark.parametrize("name", SCHEMES_OF)
def test_rows_are_those_of_the_dense_model_quantized(
    name: str, runs: Callable[[str], Path], folders: dict[bool, Path]
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(
        folders[RECIPES[name][0]]
    ).model.embed_tokens.weight
    model = AutoModelForCausalLM.from_pretrained(runs(name) / "checkpoint")
    embedding = model.model.embed_tokens
    args = embedding.config.quantization
    assert args == QuantizationArgs.parse(SCHEMES_OF[name])
    expected = round_to_nearest(dense.detach(), args, dtype=torch.float32).weight()
    torch.testing.assert_close(embedding.dense_weight(), expected.float())
    assert isinstance(model.lm_head, TiedHead) == RECIPES[name][0]


@pytest.mark.parametrize("name", SCHEMES_OF)
def test_a_loaded_model_can_be_saved_loaded_and_run_again(
    name: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs(name) / "checkpoint")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    before, after = (
        load_file(f / "model.safetensors") for f in (runs(name) / "checkpoint", tmp_path / "again")
    )
    assert before.keys() == after.keys()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    out = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert out.shape == (1, 16)


def test_a_size_counts_the_integers_of_the_embedding(runs: Callable[[str], Path]) -> None:
    file = (runs("joint") / "checkpoint/model.safetensors").stat().st_size
    assert file <= 72 * 1024  # of which the headers of so small a model may take most
    file = (runs("after-factors") / "checkpoint/model.safetensors").stat().st_size
    assert 0.8 * 50 * 1024 < file <= 50 * 1024


def test_a_head_alone_is_a_plain_checkpoint(runs: Callable[[str], Path]) -> None:
    config = json.loads((runs("head-alone") / "checkpoint/config.json").read_text())
    block = config["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"
    assert "lm_head" not in block["ignore"]
    assert "model.layers.0.self_attn.q_proj" in block["ignore"]


def test_a_stopped_run_continues_after_the_quantized_embedding(
    folders: dict[bool, Path], tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    path = tiny_recipe(folders[True], tmp_path / "run", stages=RECIPES["tied"][1])
    loaded = load_recipe(path)

    def stop(stage: str, *_: Any) -> None:
        if stage == "compress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(loaded, Machine("cpu", on_step=stop))
    monkeypatch.setattr(embeddings, "round_to_nearest", None)  # is not called again
    compress(loaded, Machine("cpu"))
    model = load_checkpoint(tmp_path / "run/checkpoint")
    assert isinstance(model.lm_head, TiedHead)


def test_it_is_planned_shown_and_inspected(
    runs: Callable[[str], Path],
    folders: dict[bool, Path],
    tiny_recipe: Any,
    tmp_path: Path,
    lrc: Any,
) -> None:
    path = tiny_recipe(folders[True], tmp_path / "run", stages=RECIPES["tied"][1])
    planned = lrc("plan", str(path))
    assert planned.code == 0, planned.err
    assert "model.embed_tokens" in planned.out
    inspected = lrc("inspect", str(runs("tied") / "checkpoint"), "--verify")
    assert inspected.code == 0, inspected.err
    row = next(line for line in inspected.out.splitlines() if "model.embed_tokens" in line)
    assert "dense int8" in row


BAD: dict[str, tuple[bool, list[dict[str, Any]], str, str]] = {
    "a head that is tied": (
        True,
        [quantize(lm_head="int8")],
        "unsupported-embedding",
        "stages[0].quantize.lm_head",
    ),
    "groups that do not divide": (
        True,
        [quantize(embeddings="int8-g24")],
        "indivisible-rows",
        "stages[0].quantize.embeddings",
    ),
    "twice": (
        True,
        [mixed(keep=0.3, embeddings="int8"), quantize(targets=[], embeddings="int8")],
        "given-twice",
        "stages[1].quantize.embeddings",
    ),
    "a malformed scheme": (
        True,
        [quantize(embeddings="int9")],
        "unknown-value",
        "stages[0].quantize.embeddings",
    ),
    "keys that apply to nothing": (
        True,
        [quantize(targets=[], group_size=16, embeddings="int8")],
        "conflicting-keys",
        "stages[0].quantize",
    ),
    "linears that all stay dense": (
        True,
        [
            {"decompose": {"method": "svd-llm", "keep": 0.05, "rank_multiple": 16}},
            quantize(targets=[], embeddings="int8"),
        ],
        "nothing-smaller",
        "stages",
    ),
    "what grows": (
        True,
        [quantize(embeddings="int8-g1")],
        "no-saving",
        "stages[0].quantize.embeddings",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_quantization_is_refused(
    name: str, folders: dict[bool, Path], tiny_recipe: Any, tmp_path: Path, lrc: Any
) -> None:
    tied, stages, code, where = BAD[name]
    path = tiny_recipe(folders[tied], tmp_path / "run", stages=stages)
    lrc("compress", str(path)).refuses(2, code=code, where=where)


def test_a_plan_that_quantizes_differently_than_the_recipe_is_refused(
    runs: Callable[[str], Path],
    folders: dict[bool, Path],
    tiny_recipe: Any,
    tmp_path: Path,
    lrc: Any,
) -> None:
    plan = json.loads((runs("joint") / "plan.json").read_text())
    file = tmp_path / "plan.json"
    given = {"method": "mixed", "plan": str(file), "compensate": {}}

    def planned(**options: str) -> Any:
        stages = [{"decompose": {**given, **options}}]
        path = tiny_recipe(folders[True], tmp_path / "run", stages=stages)
        return lrc("plan", str(path), "model.dtype=float32")

    file.write_text(json.dumps(plan))
    assert planned(embeddings="int6-g16").code == 0
    differs = {"code": "user-plan-mismatch", "where": "stages[0].decompose.plan"}
    planned().refuses(2, "model.embed_tokens to int6-g16, got nothing", **differs)
    plan["embeddings"][0]["config"]["components"][0]["quantization"] = "int4-g16"
    file.write_text(json.dumps(plan))
    words = "model.embed_tokens to int4-g16, got int6-g16"
    planned(embeddings="int6-g16").refuses(2, words, **differs)
    for spoiled in (3, [3]):
        file.write_text(json.dumps({**plan, "embeddings": spoiled}))
        planned(embeddings="int6-g16").refuses(
            2, "embeddings", code="invalid-user-plan", where=str(file)
        )
