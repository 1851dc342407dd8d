"""Integers that cannot be had: one clear error each, before any weight is read where shapes tell.

The tiny model has linears of 32 or 48 inputs, the smallest [16, 32].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import read_matrices

GPTQ = {"quantize": {"method": "gptq", "bits": 4}}
INT4 = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}


def gptq(**options: Any) -> dict[str, Any]:
    return {"quantize": {**GPTQ["quantize"], **options}}


def decompose(method: str, keep: float = 0.6, **options: Any) -> dict[str, Any]:
    return {"decompose": {"method": method, "keep": keep, **options}}


STAGES: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "groups that do not divide": (
        [gptq(group_size=32)],
        (
            "stages[0].quantize.group_size: must divide the rows that it cuts into groups, got 32 "
            "for model.layers.*.mlp.down_proj (2 layers, rows of 48); set group_size: 16, which "
            "divides all, or list these layers under 'ignore'",
        ),
    ),
    "groups of several layers that do not divide": (
        [gptq(group_size=24)],
        ("self_attn.q_proj (2 layers, rows of 32); ", "mlp.up_proj (2 layers, rows of 32)"),
    ),
    "groups that divide next to nothing": (
        [gptq(group_size=7)],
        ("got 7 for", "leave group_size out, for one scale a row, or list these layers"),
    ),
    "groups that ranks of a stage before do not fill": (
        [decompose("svd", overrides=[{"match": "*.q_proj", "rank": 5}]), INT4],
        ("stages[1].quantize.group_size", "rows of 5); make their ranks multiples of it, or list"),
    ),
    "groups beyond every rank": (
        [decompose("svd"), gptq(group_size=32, ignore=["*.down_proj"])],
        ("decompose.rank_multiple: must be in", "of the group_size of 'quantize' too, 32: lower"),
    ),
    "no bits": ([gptq(bits=1)], ("quantize.bits: must be in [2, 8], got 1; raise it",)),
    "too many bits": ([gptq(bits=9)], ("quantize.bits: must be in [2, 8], got 9; lower it",)),
    "an unknown rounder": (
        [gptq(method="gpqt")],
        ("quantize.method: must be one of", "got 'gpqt'; did you mean 'gptq'?"),
    ),
    "rounded twice": (
        [GPTQ, INT4],
        ("q_proj is already rounded by stages[0]; list it under one of the two 'ignore'",),
    ),
    "rounded by mixed and again": (
        [decompose("mixed", 0.3, schemes=["int8"]), GPTQ],
        ("stages[1].quantize.targets", "already rounded by stages[0]", "or leave out 'schemes'"),
    ),
    "nothing to round": (
        [gptq(ignore=["*"])],
        ("quantize.targets: must leave at least one linear to round", "or remove the stage"),
    ),
    "rounded before it is decomposed": (
        [GPTQ, decompose("svd")],
        ("error[conflicting-keys]", "every 'decompose' must come before every 'quantize'"),
    ),
    "rounded before it is sliced": (
        [GPTQ, {"slice": {"method": "drop", "keep": 0.8}}],
        ("error[conflicting-keys]", "every 'slice' must come before every 'quantize'"),
    ),
    "a size before rounding": (
        [{"decompose": {"method": "kfac", "size": "90kB"}}, GPTQ],
        ("decompose.size: counts the bytes of files that no stage rounds", "give 'keep', before"),
    ),
    "a branch as large as the smallest weight": (
        [gptq(low_rank_correction={"rank": 16})],
        (
            "low_rank_correction.rank: must be below 16, the smaller side of",
            "k_proj [16, 32], got 16; lower",
        ),
    ),
    "a branch that eats what rounding saves": (
        [gptq(bits=8, low_rank_correction={"rank": 12})],
        ("low_rank_correction.rank: must make model.layers.0.self_attn.q_proj [32, 32] smaller",),
    ),
    "scales that eat what rounding saves": (
        [gptq(bits=8, group_size=1)],
        ("quantize.group_size: must make", "got 1, which makes", "raise it, or list the layer"),
    ),
    "compensation of a shared factor": (
        [decompose("basis-sharing"), gptq(compensate={})],
        ("stages[1].quantize.compensate: must be left out where layers share a factor",),
    ),
    "compensation of a shared dictionary": (
        [decompose("cospadi", layers_per_group=2), gptq(compensate={})],
        ("stages[1].quantize.compensate: must be left out where layers share a factor",),
    ),
    "compensation behind biases": (
        [decompose("lord"), gptq(compensate={})],
        ("decompose.method: lord cannot stand beside 'compensate'",),
    ),
    "sums before groups": (
        [decompose("mixed", 0.8, components=["pivoted_low_rank+sparse"]), INT4],
        ("decompose.components: pivoted_low_rank+sparse has ranks", "groups of 16 do not divide"),
    ),
    "a scheme that is none": (
        [decompose("mixed", 0.3, schemes=["int4-64"])],
        ("error[unknown-value]", "decompose.schemes[0]: ", "got 'int4-64'"),
    ),
    "a scheme of too many bits": (
        [decompose("mixed", 0.3, schemes=["int8", "int9"])],
        ("error[unknown-value]", "decompose.schemes[1]: ", "got 'int9'"),
    ),
    "a scheme twice": (
        [decompose("mixed", 0.3, schemes=["int8", "int8"])],
        ("error[conflicting-keys]", "the 'schemes' must differ"),
    ),
    "a scheme that fits nothing": (
        [decompose("mixed", 0.3, schemes=["int8", "int4-g64"])],
        ("schemes[1]: must have groups that divide the inputs of a targeted matrix, 32, 48, got",),
    ),
    "schemes for multiply-adds": (
        [decompose("mixed", schemes=["int8"], measure="macs")],
        ("error[conflicting-keys]", "'schemes' save bits", "measure: macs"),
    ),
    "dense and no schemes": (
        [decompose("mixed", components=["dense"])],
        ("error[conflicting-keys]", "components: [dense] needs 'schemes'"),
    ),
    "a share below all integers": (
        [decompose("mixed", 0.2, components=["dense"], schemes=["int4"])],
        (
            "decompose.keep: must be at least 0.287 of the bits, which the cheapest",
            "got 0.2; raise",
        ),
    ),
    "a size below all integers": (
        [
            {
                "decompose": {
                    "method": "mixed",
                    "size": "84kB",
                    "components": ["dense"],
                    "schemes": ["int4"],
                }
            }
        ],
        ("decompose.size: must be at least", "which the cheapest choice takes, got 84kB; raise"),
    ),
}


@pytest.mark.parametrize("case", STAGES)
def test_stages_that_cannot_be_are_refused_before_any_weight_is_read(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, words = STAGES[case]
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        lrc(command, recipe, f"stages={json.dumps(stages)}").refuses(2, *words)
    assert not output.exists()


MIXED = decompose("mixed", 0.3, schemes=["int8", "int4-g16"])
KFAC = [decompose("kfac", 0.8), INT4]


def of_first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plan: plan["matrices"][0].update(changes)


PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "integers without a scheme": (
        of_first(form="integers", scheme=None),
        ("scheme must be written like int8 or int4-g64 for integers, got null; correct it",),
    ),
    "a scheme that is none": (
        of_first(form="integers", scheme="int4-64"),
        ("must be written like int8, int4-g64", "got 'int4-64'; correct it"),
    ),
    "a scheme of too many bits": (
        of_first(form="integers", scheme="int9"),
        ("scheme int9: bits must be in [2, 8], got 9; correct it",),
    ),
    "a scheme that is no text": (
        of_first(form="integers", scheme=4),
        ("scheme must be written like int8 or int4-g64, got 4; correct it",),
    ),
    "groups that do not divide": (
        of_first(form="integers", scheme="int4-g24"),
        ("rows of 32 numbers are no multiple of the group size 24; correct the scheme, or make",),
    ),
    "a rank that groups do not divide": (
        of_first(form="low_rank", rank=5, scheme="int4-g16"),
        ("rows of 5 numbers are no multiple of the group size 16; correct sizes or scheme",),
    ),
    "a rank that saves nothing": (
        of_first(form="low_rank", rank=32, scheme="int8-g8"),
        ("low_rank of rank 32 takes as much as the dense matrix; lower rank to at most 24",),
    ),
    "scales that save nothing": (
        of_first(form="integers", scheme="int8-g1"),
        ("integers of int8-g1 take as much as the dense matrix; give another scheme, or make it",),
    ),
    "dense with a scheme": (
        of_first(form="dense", scheme="int8", rank=None),
        ("a dense matrix has the scheme null, got 'int8'; correct form or scheme",),
    ),
    "a branch": (
        of_first(form="integers_plus_low_rank", rank=4, scheme="int8"),
        ("form must be dense or low_rank or", "got integers_plus_low_rank; correct it"),
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


def weights_of(run: Path) -> bytes:
    return (run / "checkpoint/model.safetensors").read_bytes()


def first_of(run: Path) -> Any:
    return read_matrices(json.loads((run / "checkpoint/lrc/plan.json").read_text())["matrices"])[0]


def given(method: str, file: Path, *behind: dict[str, Any]) -> str:
    return f"stages={json.dumps([{'decompose': {'method': method, 'plan': str(file)}}, *behind])}"


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_of_integers_that_cannot_be(
    lrc, recipe, output, joint: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = PLANS[case]
    plan = json.loads((joint / "plan.json").read_text())
    spoil(plan)
    file = recipe.with_name("plan.json")
    file.write_text(json.dumps(plan))
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        lrc(command, recipe, given("mixed", file)).refuses(2, f"{file}, model.layers.0", *words)
    assert not output.exists()


def test_a_plan_of_integers_is_given_back_to_the_same_bytes_and_edited(
    lrc, recipe: Path, output: Path, joint: Path
) -> None:
    text = (joint / "plan.json").read_text()
    file = recipe.with_name("plan.json")
    changes: list[dict[str, Any]] = [
        {},
        {"form": "integers", "scheme": "int5-g8", "rank": None},
        {"form": "pivoted_low_rank", "rank": 7, "scheme": None},
        {"form": "low_rank", "rank": 16, "scheme": "int3-g16"},
        {"form": "sparse", "nonzeros": 300, "scheme": "int4-g16"},
        {"form": "dense", "rank": None, "scheme": None},
    ]
    for change in changes:
        plan = json.loads(text)
        plan["matrices"][0].update(change)
        file.write_text(json.dumps(plan))
        assert lrc("compress", recipe, given("mixed", file), "--overwrite", "-q").code == 0
        assert (weights_of(output) == weights_of(joint)) == (change == {})
        if change:
            found = first_of(output)
            assert (found.form, found.scheme) == (change["form"], change["scheme"])


def test_the_plan_of_a_decomposition_that_is_rounded_is_given_back(
    lrc, recipe: Path, output: Path, factored: Path
) -> None:
    """Bits are for the stage that rounds to say: another one may stand there, or none."""
    file = factored / "plan.json"
    assert lrc("compress", recipe, given("kfac", file, INT4), "-q").code == 0
    assert weights_of(output) == weights_of(factored)
    for behind, schemes in (([GPTQ], {"int4"}), ([], {None})):
        assert lrc("compress", recipe, given("kfac", file, *behind), "--overwrite", "-q").code == 0
        plan = json.loads((output / "checkpoint/lrc/plan.json").read_text())
        assert {m["scheme"] for m in plan["matrices"]} == schemes
    lrc("plan", recipe, given("svd", joint_of(recipe, factored))).refuses(2, "scheme int1: bits")


def joint_of(recipe: Path, run: Path) -> Path:
    plan = json.loads((run / "plan.json").read_text())
    plan["matrices"][0]["scheme"] = "int1"
    file = recipe.with_name("spoiled.json")
    file.write_text(json.dumps(plan))
    return file


WEIGHTS: dict[str, Callable[[torch.Tensor], object]] = {
    "zeros": lambda W: W.zero_(),
    "rank one": lambda W: W.copy_(W[:, :1] @ W[:1]),
    "nearly zeros": lambda W: W.mul_(1e-7),
    "a row of nearly zeros": lambda W: W[1].mul_(1e-6),
}
ROUNDINGS = {
    "rtn": [{"quantize": {"method": "rtn"}}],
    "gptq": [INT4],
    "branch": [gptq(group_size=16, low_rank_correction={"rank": 3})],
    "factors": KFAC,
    "joint": [MIXED],
    "joint-dense": [decompose("mixed", 0.4, schemes=["int8", "int4-g16"], components=["dense"])],
}


@pytest.mark.parametrize("stages", ROUNDINGS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_little_are_rounded_all_the_same(
    lrc, recipe, output, spoiled: Callable[..., Path], weights: str, stages: str
) -> None:
    source = spoiled(WEIGHTS[weights], "model.layers.0.mlp.up_proj.weight")
    model = f"model={{path: {source}, dtype: float16}}"
    ended = lrc("compress", recipe, model, f"stages={json.dumps(ROUNDINGS[stages])}", "-q")
    assert ended.code == 0, ended.err
    plan = json.loads((output / "checkpoint/lrc/plan.json").read_text())
    small = next(m for m in plan["matrices"] if m["name"] == "model.layers.0.mlp.up_proj")
    assert small["form"] != "dense", small
    assert stages == "joint" or small["scheme"] is not None  # few factors cost no more unrounded
    tensors = load_file(output / "checkpoint/model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


@pytest.fixture
def spoiled(tiny_llama, make_tokenizer, tmp_path: Path) -> Callable[..., Path]:
    def make(spoil: Callable[[torch.Tensor], object], name: str) -> Path:
        model: LlamaForCausalLM = tiny_llama()
        with torch.no_grad():
            spoil(model.get_parameter(name))
        model.save_pretrained(tmp_path / "spoiled")
        make_tokenizer().save_pretrained(tmp_path / "spoiled")
        return tmp_path / "spoiled"

    return make


@pytest.mark.parametrize("stages", ROUNDINGS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(
    lrc, recipe, output, spoiled, bad: float, stages: str
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    source = spoiled(lambda W: W[3].fill_(bad), name)
    ended = lrc("compress", recipe, f"model={source}", f"stages={json.dumps(ROUNDINGS[stages])}")
    ended.refuses(1, f"{name} holds NaN or Inf; the source is damaged")
    assert not (output / "checkpoint").exists()
