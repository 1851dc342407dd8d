"""Impossible quantization: one clear error each, before any weight is read where shapes suffice.

The tiny model has linear layers of 32 or 48 inputs, the smallest [16, 32].
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lrc.compressors.layers import WeightConfig
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.summary import WeightSummary, summarize

GPTQ = {"quantize": {"method": "gptq", "bits": 4}}
INT4 = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}


def gptq(**options: Any) -> dict[str, Any]:
    return {"quantize": {**GPTQ["quantize"], **options}}


def decompose(method: str, keep: float = 0.6, **options: Any) -> dict[str, Any]:
    return {"decompose": {"method": method, "keep": keep, **options}}


GROUP_SIZE = "stages[0].quantize.group_size"
CORRECTION = "stages[0].quantize.low_rank_correction.rank"
STAGES: dict[str, tuple[list[dict[str, Any]], str, str, tuple[str, ...]]] = {
    "groups that do not divide": (
        [gptq(group_size=32)],
        "indivisible-rows",
        GROUP_SIZE,
        ("32 for model.layers.*.mlp.down_proj (2 layers, rows of 48); set group_size: 16, which",),
    ),
    "groups of several layers that do not divide": (
        [gptq(group_size=24)],
        "indivisible-rows",
        GROUP_SIZE,
        ("self_attn.q_proj (2 layers, rows of 32); ", "mlp.up_proj (2 layers, rows of 32)"),
    ),
    "groups that divide next to nothing": (
        [gptq(group_size=7)],
        "indivisible-rows",
        GROUP_SIZE,
        ("got 7 for", "leave group_size out"),
    ),
    "groups that ranks of an earlier stage do not fill": (
        [decompose("svd", keep=0.9, overrides=[{"match": "*.q_proj", "rank": 5}]), INT4],
        "indivisible-rows",
        "stages[1].quantize.group_size",
        ("rows of 5); make their ranks multiples of it",),
    ),
    "a scheme without blocks of GGUF": (
        [
            decompose(
                "mixed", components=["dense"], schemes=["int4-g32", "int4-g16"], measure="gguf"
            )
        ],
        "no-block-type",
        "stages[0].decompose.schemes[1]",
        ("got int4-g16: the groups of int4-g16 are not a multiple of 32; use some of int3-g16-s",),
    ),
    "super-blocks that no row fills": (
        [
            decompose(
                "mixed", components=["dense"], schemes=["int8-g16", "int3-g16-s256"], measure="bits"
            )
        ],
        "indivisible-rows",
        "stages[0].decompose.schemes[1]",
        ("(row lengths: 32, 48), got int3-g16-s256; ", "remove the scheme"),
    ),
    "groups larger than every rank": (
        [decompose("svd"), gptq(group_size=32, ignore=["*.down_proj"])],
        "out-of-range",
        "stages[0].decompose.rank_multiple",
        ("got 32", "group_size of a later 'quantize'"),
    ),
    "no bits": ([gptq(bits=1)], "out-of-range", "stages[0].quantize.bits", ("got 1; raise",)),
    "too many bits": (
        [gptq(bits=9)],
        "out-of-range",
        "stages[0].quantize.bits",
        ("got 9; lower",),
    ),
    "an unknown quantizer": (
        [gptq(method="gpqt")],
        "unknown-value",
        "stages[0].quantize.method",
        ("got 'gpqt'; did you mean 'gptq'?",),
    ),
    "quantized twice": (
        [GPTQ, INT4],
        "already-quantized",
        "stages[1].quantize.targets",
        ("q_proj", "stages[0]"),
    ),
    "quantized by mixed and again": (
        [decompose("mixed", 0.3, schemes=["int8"]), GPTQ],
        "already-quantized",
        "stages[1].quantize.targets",
        ("stages[0]", "'schemes'"),
    ),
    "nothing to quantize": (
        [gptq(ignore=["*"])],
        "no-match",
        "stages[0].quantize.targets",
        ("or remove the stage",),
    ),
    "quantized before it is decomposed": (
        [GPTQ, decompose("svd")],
        "conflicting-keys",
        "",
        ("every 'decompose' must come before every 'quantize'",),
    ),
    "quantized before it is sliced": (
        [GPTQ, {"slice": {"method": "drop", "keep": 0.8}}],
        "conflicting-keys",
        "",
        ("every 'slice' must come before every 'quantize'",),
    ),
    "a size before quantization": (
        [{"decompose": {"method": "kfac", "size": "90kB"}}, GPTQ],
        "contradiction",
        "stages[0].decompose.size",
        ("use 'keep'",),
    ),
    "a correction as large as the smallest weight": (
        [gptq(low_rank_correction={"rank": 16})],
        "rank-out-of-range",
        CORRECTION,
        ("must be below 16", "k_proj [16, 32], got 16; lower"),
    ),
    "a correction as large as what quantization saves": (
        [gptq(bits=8, low_rank_correction={"rank": 12})],
        "no-saving",
        CORRECTION,
        ("model.layers.0.self_attn.q_proj [32, 32]", "got 12"),
    ),
    "scales as large as what quantization saves": (
        [gptq(bits=8, group_size=1)],
        "no-saving",
        GROUP_SIZE,
        ("got 1,", "raise it, or list the layer"),
    ),
    "compensation of a shared factor": (
        [decompose("basis-sharing"), gptq(compensate={})],
        "shared-factor",
        "stages[1].quantize.compensate",
        (),
    ),
    "compensation of a shared dictionary": (
        [decompose("cospadi", layers_per_group=2), gptq(compensate={})],
        "shared-factor",
        "stages[1].quantize.compensate",
        (),
    ),
    "compensation after biases": (
        [decompose("lord"), gptq(compensate={})],
        "contradiction",
        "stages[0].decompose.method",
        ("lord", "'compensate'"),
    ),
    "sums before groups": (
        [decompose("mixed", 0.8, components=["pivoted_low_rank+sparse"]), INT4],
        "contradiction",
        "stages[0].decompose.components",
        ("group_size 16",),
    ),
    "a malformed scheme": (
        [decompose("mixed", 0.3, schemes=["int4-64"])],
        "unknown-value",
        "stages[0].decompose.schemes[0]",
        ("got 'int4-64'",),
    ),
    "a scheme of too many bits": (
        [decompose("mixed", 0.3, schemes=["int8", "int9"])],
        "unknown-value",
        "stages[0].decompose.schemes[1]",
        ("got 'int9'",),
    ),
    "a scheme twice": (
        [decompose("mixed", 0.3, schemes=["int8", "int8"])],
        "conflicting-keys",
        "stages[0].decompose",
        ("'schemes'",),
    ),
    "a scheme that fits no weight": (
        [decompose("mixed", 0.3, schemes=["int8", "int4-g64"])],
        "indivisible-rows",
        "stages[0].decompose.schemes[1]",
        ("(row lengths: 32, 48), got int4-g64",),
    ),
    "schemes for multiply-adds": (
        [decompose("mixed", schemes=["int8"], measure="macs")],
        "conflicting-keys",
        "stages[0].decompose",
        ("'schemes'", "measure: macs"),
    ),
    "dense and no schemes": (
        [decompose("mixed", components=["dense"])],
        "conflicting-keys",
        "stages[0].decompose",
        ("components: [dense] needs 'schemes'",),
    ),
    "a fraction below all integers": (
        [decompose("mixed", 0.2, components=["dense"], schemes=["int4"])],
        "infeasible-budget",
        "stages[0].decompose.keep",
        ("at least 0.287 of the bits", "got 0.2; raise"),
    ),
    "a size below all integers": (
        [
            {
                "decompose": {
                    "method": "mixed",
                    "size": "81kB",
                    "components": ["dense"],
                    "schemes": ["int4"],
                }
            }
        ],
        "infeasible-budget",
        "stages[0].decompose.size",
        ("must be at least", "got 81kB; raise"),
    ),
}


@pytest.mark.parametrize("case", STAGES)
def test_impossible_stages_are_refused_before_any_weight_is_read(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, code, where, words = STAGES[case]
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        ended = lrc(command, recipe, f"stages={json.dumps(stages)}")
        ended.refuses(2, *words, code=code, where=where)
    assert not output.exists()


MIXED = decompose("mixed", 0.3, schemes=["int8", "int4-g16"])
KFAC = [decompose("kfac", 0.8), INT4]


def dense(quantization: Any) -> list[dict[str, Any]]:
    return [{"type": "dense", "quantization": quantization}]


PLANS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "dense without integers": ([{"type": "dense"}], "invalid-user-plan", "quantiz"),
    "malformed integers": (dense("int4-64"), "invalid-user-plan", "got 'int4-64'"),
    "integers of too many bits": (dense("int9"), "invalid-user-plan", "got 9"),
    "integers that are not text": (dense(4), "invalid-user-plan", "got '4'"),
    "groups that do not divide": (
        dense("int4-g24"),
        "invalid-user-plan",
        "rows of 32 numbers are not a multiple of the group size 24",
    ),
    "a rank that groups do not divide": (
        [{"type": "low_rank", "rank": 5, "quantization": "int4-g16"}],
        "invalid-user-plan",
        "rows of 5 numbers are not a multiple of the group size 16",
    ),
    "a rank that saves nothing": (
        [{"type": "low_rank", "rank": 32, "quantization": "int8-g8"}],
        "size-out-of-range",
        "lower rank to at most 24",
    ),
    "scales that save nothing": (dense("int8-g1"), "size-out-of-range", "int8-g1"),
    "a correction": (
        [*dense("int8"), {"type": "low_rank", "rank": 4}],
        "wrong-component",
        "got dense+low_rank",
    ),
}


@pytest.fixture(scope="module")
def joint(tiny_model_folder, tiny_recipe, tmp_path_factory) -> Path:
    return run_of(tiny_model_folder, tiny_recipe, tmp_path_factory, [MIXED])


@pytest.fixture(scope="module")
def factored(tiny_model_folder, tiny_recipe, tmp_path_factory) -> Path:
    return run_of(tiny_model_folder, tiny_recipe, tmp_path_factory, KFAC)


def run_of(source: Path, tiny_recipe: Any, factory: Any, stages: list[dict[str, Any]]) -> Path:
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.pipeline import compress
    from lrc.configs.load import load_recipe

    output: Path = factory.mktemp("given") / "run"
    compress(load_recipe(tiny_recipe(source, output, stages=stages)), Machine("cpu"))
    return output


def bytes_of(run: Path) -> bytes:
    return (run / "checkpoint/model.safetensors").read_bytes()


def given(method: str, file: Path, *later: dict[str, Any]) -> str:
    return f"stages={json.dumps([{'decompose': {'method': method, 'plan': str(file)}}, *later])}"


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_of_impossible_integers_is_refused(
    lrc, recipe, output, joint: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, code, words = PLANS[case]
    plan = json.loads((joint / "plan.json").read_text())
    plan["tasks"][0]["config"]["components"] = components
    file = recipe.with_name("plan.json")
    file.write_text(json.dumps(plan))
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        ended = lrc(command, recipe, given("mixed", file))
        ended.refuses(2, "model.layers.0.self_attn.q_proj", words, code=code, where=str(file))
    assert not output.exists()


def test_integers_of_a_dense_weight_are_refused(lrc, recipe, joint: Path) -> None:
    plan = json.loads((joint / "plan.json").read_text())
    plan["tasks"][0]["config"] |= {"components": [], "quantization": "int8"}
    file = recipe.with_name("plan.json")
    file.write_text(json.dumps(plan))
    ended = lrc("plan", recipe, given("mixed", file))
    ended.refuses(2, "'quantization'", code="invalid-user-plan", where=str(file))


def test_a_plan_of_integers_is_given_back_to_the_same_bytes_and_edited(
    lrc, recipe: Path, output: Path, joint: Path, executed: Callable[[Path], Plan]
) -> None:
    text = (joint / "plan.json").read_text()
    file = recipe.with_name("plan.json")
    changes: list[list[dict[str, Any]] | None] = [
        None,
        dense("int5-g8"),
        [{"type": "pivoted_low_rank", "rank": 7}],
        [{"type": "low_rank", "rank": 16, "quantization": "int3-g16"}],
        [{"type": "sparse", "nonzeros": 300, "quantization": "int4-g16"}],
        [],
    ]
    for components in changes:
        plan = json.loads(text)
        config = plan["tasks"][0]["config"]
        if components is not None:
            config["components"] = components
        file.write_text(json.dumps(plan))
        assert lrc("compress", recipe, given("mixed", file), "--overwrite", "-q").code == 0
        assert (bytes_of(output) == bytes_of(joint)) == (components is None)
        found = executed(output)
        assert found.stored_config(found.tasks[0]) == WeightConfig.from_json(config)


def test_the_plan_of_a_decomposition_that_is_quantized_is_given_back(
    lrc, recipe: Path, output: Path, factored: Path, executed: Callable[[Path], Plan]
) -> None:
    """The stage that quantizes decides about integers: another one may follow, or none."""
    file = factored / "plan.json"
    assert lrc("compress", recipe, given("kfac", file, INT4), "-q").code == 0
    assert bytes_of(output) == bytes_of(factored)
    for later, schemes in (([GPTQ], {"int4"}), ([], {"None"})):
        assert lrc("compress", recipe, given("kfac", file, *later), "--overwrite", "-q").code == 0
        assert {str(row.config.quantization) for row in summarize(executed(output))} == schemes
    plan = json.loads(file.read_text())
    plan["tasks"][0]["config"]["components"] = dense("int1")
    spoiled = recipe.with_name("spoiled.json")
    spoiled.write_text(json.dumps(plan))
    ended = lrc("plan", recipe, given("svd", spoiled))
    ended.refuses(2, "bits must be in", code="invalid-user-plan", where=str(spoiled))


SMALL: dict[str, Callable[[torch.Tensor], object]] = {
    "model.layers.0.mlp.up_proj": lambda W: W.zero_(),
    "model.layers.1.mlp.up_proj": lambda W: W.copy_(W[:, :1] @ W[:1]),  # of rank one
    "model.layers.0.mlp.gate_proj": lambda W: W.mul_(1e-7),
    "model.layers.1.mlp.gate_proj": lambda W: W[1].mul_(1e-6),
}
QUANTIZED = {
    "rtn": [{"quantize": {"method": "rtn"}}],
    "gptq": [INT4],
    "correction": [gptq(group_size=16, low_rank_correction={"rank": 3})],
    "factors": KFAC,
    "joint": [MIXED],
    "joint-dense": [decompose("mixed", 0.4, schemes=["int8", "int4-g16"], components=["dense"])],
}


@pytest.mark.parametrize("stages", QUANTIZED)
def test_small_weights_are_quantized_like_others(
    lrc,
    recipe,
    output,
    spoiled: Callable[..., Path],
    executed: Callable[[Path], Plan],
    stages: str,
) -> None:
    source = spoiled({f"{name}.weight": spoil for name, spoil in SMALL.items()})
    model = f"model={{path: {source}, dtype: float16}}"
    ended = lrc("compress", recipe, model, f"stages={json.dumps(QUANTIZED[stages])}", "-q")
    assert ended.code == 0, ended.err
    rows: dict[str, WeightSummary] = {row.name: row for row in summarize(executed(output))}
    for name in SMALL:
        small = rows[name]
        assert small.config.compressed, small
        # Small factors may cost no more unquantized.
        assert stages == "joint" or small.config.quantization is not None
    tensors = load_file(output / "checkpoint/model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


@pytest.fixture
def spoiled(tiny_llama, make_tokenizer, tmp_path: Path) -> Callable[..., Path]:
    def make(weights: Mapping[str, Callable[[torch.Tensor], object]]) -> Path:
        model: LlamaForCausalLM = tiny_llama()
        with torch.no_grad():
            for name, spoil in weights.items():
                spoil(model.get_parameter(name))
        model.save_pretrained(tmp_path / "spoiled")
        make_tokenizer().save_pretrained(tmp_path / "spoiled")
        return tmp_path / "spoiled"

    return make


@pytest.mark.parametrize("stages", QUANTIZED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(
    lrc, recipe, output, spoiled, bad: float, stages: str
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    source = spoiled({name: lambda W: W[3].fill_(bad)})
    ended = lrc("compress", recipe, f"model={source}", f"stages={json.dumps(QUANTIZED[stages])}")
    ended.refuses(1, f"{name} holds NaN or Inf", code="invalid-model", where="model.path")
    assert not (output / "checkpoint").exists()
