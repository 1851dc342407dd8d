"""Healing with adapters: they are merged into what is stored, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.heal_stages import INT4, MIXED, STORED
from tests.shared_runs import Run, Stopper, changed, tensors_of
from transformers import AutoModelForCausalLM

from lrc.compressors.heal import work
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


LORA = {"train": "lora", "rank": 4}
S2FT = {"train": "s2ft", "fraction": 0.5}
COMPACTER = {"train": "compacter", "rank": 2}
BUDGET = {"rate": 2e-2, "batch": 4, "held_out": 512}
DISTILL = {"method": "distill", "steps": 30, **LORA, **BUDGET}
BLOCK = {"method": "block", "steps": 20, "samples": 16, **LORA, **BUDGET}

FORMS: dict[str, list[dict[str, Any]]] = {
    **STORED,
    "quantized tensor_train": [
        {"decompose": {"method": "tensor-train", "keep": 0.6, "rounds": 1}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
    "integers": [INT4],
    "sliced integers": [
        {"slice": {"method": "slicegpt", "keep": 0.95, "rotations": "block"}},
        {"quantize": {"method": "rtn", "bits": 3, "group_size": 8}},
    ],
    "asymmetric integers": [
        {"quantize": {"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False}}
    ],
}


def options_for(train: dict[str, Any], method: str) -> dict[str, Any]:
    """Return the options of a method with those of another value of `train`."""
    options = DISTILL if method == "distill" else BLOCK
    return {name: value for name, value in options.items() if name != "rank"} | train


@pytest.mark.parametrize(
    ("method", "form"),
    [
        *(("distill", form) for form in FORMS),
        *(("block", form) for form in ("shared low_rank", "dictionary", "integers")),
    ],
)
def test_every_stored_form_absorbs_its_adapters(run_stages: Run, form: str, method: str) -> None:
    options = options_for(LORA, method)
    rate = 5e-3 if form.endswith("integers") else options["rate"]
    report, output = run_stages(*FORMS[form], {"heal": {**options, "rate": rate}})
    (record,) = report["training"]
    assert record["kept"]
    assert record["after"] < 0.99 * record["before"]
    _, plain = run_stages(*FORMS[form])
    names = changed(plain, output)
    assert names
    kinds = ("weight", "weight_packed", "values")
    assert all(name.endswith(kinds) and "norm" not in name for name in names)
    AutoModelForCausalLM.from_pretrained(output / "checkpoint")


@pytest.mark.parametrize("method", ["distill", "block"])
@pytest.mark.parametrize("train", [S2FT, COMPACTER], ids=["s2ft", "compacter"])
def test_16_bit_matrices_absorb_slices_and_kronecker_products(
    run_stages: Run, train: dict[str, Any], method: str
) -> None:
    report, output = run_stages(*MIXED, {"heal": options_for(train, method)})
    (record,) = report["training"]
    assert record["kept"]
    assert record["after"] < 0.99 * record["before"]
    _, plain = run_stages(*MIXED)
    names = changed(plain, output)
    # Value projections are dense; of the factors, only those with sides that four divides.
    dense = {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(2)}
    factors = {
        name
        for name, tensor in tensors_of(plain).items()
        if ".low_rank." in name and not any(side % 4 for side in tensor.shape)
    }
    assert names == dense | (factors if train is COMPACTER else set())


def test_the_slices_of_a_sliced_model_are_trained(run_stages: Run) -> None:
    sliced = {"slice": {"method": "modegpt", "keep": 0.9}}
    heal = options_for({"train": "s2ft", "fraction": 0.1}, "distill")
    report, output = run_stages(sliced, {"heal": heal})
    (record,) = report["training"]
    assert record["kept"]
    _, plain = run_stages(sliced)
    before, after = tensors_of(plain), tensors_of(output)
    trainable = 0
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        differs = {
            part: before[name] != after[name]
            for part in ("gate", "up", "down")
            if (name := f"{prefix}.{part}_proj.weight")
        }
        width = len(differs["up"])
        channels = differs["up"].any(1).nonzero().flatten().tolist()
        assert len(channels) == round(0.1 * width)
        assert differs["gate"].any(1).nonzero().flatten().tolist() == channels
        assert differs["down"].any(0).nonzero().flatten().tolist() == channels
        trainable += 3 * 32 * len(channels)
    assert record["trainable"] == trainable
    assert all("mlp" in name for name in changed(plain, output))


@pytest.mark.parametrize("method", ["distill", "block"])
@pytest.mark.parametrize("train", [LORA, S2FT, COMPACTER], ids=["lora", "s2ft", "compacter"])
def test_zero_steps_change_nothing(run_stages: Run, train: dict[str, Any], method: str) -> None:
    report, output = run_stages(*MIXED, {"heal": {**options_for(train, method), "steps": 0}})
    (record,) = report["training"]
    assert not record["kept"]
    assert record["after"] == record["before"] > 0
    _, plain = run_stages(*MIXED)
    assert changed(plain, output) == set()


def test_norms_scales_masks_and_embeddings_keep_their_bits(run_stages: Run) -> None:
    report, output = run_stages(*MIXED, {"heal": DISTILL})
    _, plain = run_stages(*MIXED)
    names = changed(plain, output)
    # Two layers: q, k, v, o, and two factors each of gate, up and down.
    assert len(names) == 2 * (4 + 6)
    leaves = {name.rpartition(".")[2] for name in names}
    assert leaves == {"weight", "weight_packed", "values"}
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in names)
    stored = tensors_of(plain)
    shapes = [
        # Factors and dense matrices as stored; of the others, whole matrices.
        stored[name].shape if name.endswith(".weight") else (16 if "k_proj" in name else 32, 32)
        for name in names
    ]
    assert report["training"][0]["trainable"] == sum(4 * (m + n) for m, n in shapes)


ONE = {"rank": None, "rate": 1e-2}


def chain(train: dict[str, Any]) -> list[dict[str, Any]]:
    """Return stages of which two train."""
    block = {**options_for(train, "block"), "parts": "separate"}
    return [*MIXED, {"heal": block}, {"heal": options_for(train, "distill")}]


@pytest.mark.parametrize("train", [LORA, COMPACTER], ids=["lora", "compacter"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    run_stages: Run,
    train: dict[str, Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "SNAPSHOT_SECONDS", 0.0)
    stages = chain(train)
    report, undisturbed = run_stages(*stages)
    assert report["training"][1]["kept"]
    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))
    for calls in (1, 2, 11):
        with pytest.raises(Stopped):
            compress(recipe, Machine(on_step=Stopper(calls)))
    again = compress(recipe)
    assert changed(undisturbed, tmp_path / "run") == set()
    trainable = [[each["trainable"] for each in done["training"]] for done in (report, again)]
    assert trainable[0] == trainable[1]


def test_recomputation_gives_the_same_bytes(run_stages: Run) -> None:
    _, ours = run_stages(*MIXED, {"heal": DISTILL})
    _, theirs = run_stages(*MIXED, {"heal": {**DISTILL, "checkpointing": True}})
    assert changed(ours, theirs) == set()


KEPT = {**DISTILL, "merge": False, "rate": 1e-2}


def test_adapters_of_integers_can_be_kept_as_components(
    run_stages: Run, executed: Callable[[Path], Any]
) -> None:
    report, output = run_stages(
        *MIXED, {"heal": KEPT}, {"heal": {**DISTILL, "train": "factors", **ONE}}
    )
    first, second = report["training"]
    assert first["kept"]
    assert second["kept"]
    assert second["before"] == pytest.approx(first["after"], rel=1e-3)
    _, plain = run_stages(*MIXED)
    before, after = tensors_of(plain), tensors_of(output)
    added = after.keys() - before.keys()
    layers = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    factors = ("low_rank.a.weight", "low_rank.b.weight")
    assert added == {f"{layer}.{leaf}" for layer in layers for leaf in factors}
    kept = [name for name in before if "o_proj" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    plans = executed(plain), executed(output)
    bits = [plan.bits for plan in plans]
    assert bits[1] - bits[0] == 16 * sum(after[name].numel() for name in added)
    assert plans[1].training[0].added_bytes == (bits[1] - bits[0]) // 8
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    for layer in layers:
        assert model.get_submodule(layer).config.types == "dense+low_rank"


def test_adapters_that_do_not_help_are_not_kept(run_stages: Run) -> None:
    report, output = run_stages(*MIXED, {"heal": {**KEPT, "rate": 0.9, "steps": 2}})
    assert not report["training"][0]["kept"]
    _, plain = run_stages(*MIXED)
    assert changed(plain, output) == set()


def test_components_that_save_nothing_are_refused(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    sparse = {"decompose": {"method": "magnitude", "keep": 0.6}}
    cases = [
        ([INT4, {"heal": {**KEPT, "rank": 16}}], "stages[1].heal.rank", "lower it"),
        ([sparse, {"heal": KEPT}], "stages[1].heal.merge", "without integers"),
    ]
    for stages, where, words in cases:
        recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
        lrc("plan", recipe).refuses(2, words, where=where)
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[INT4, {"heal": KEPT}])
    assert "adds up to" in lrc("plan", recipe).out


BAD = {
    "an option of another value": (
        INT4,
        {**LORA, "train": "factors"},
        "conflicting-keys",
        "stages[1].heal",
        "'rank' is an option of 'train: lora or compacter'",
    ),
    "integers have no slices": (
        INT4,
        S2FT,
        "nothing-to-train",
        "stages[1].heal.train",
        "no MLP or attention matrices in 16 bits",
    ),
    "fewer than half a channel": (
        {"decompose": {"method": "svd", "keep": 0.6, "targets": ["*.q_proj"]}},
        {"train": "s2ft", "fraction": 0.01},
        "nothing-to-train",
        "stages[1].heal.train",
        "with that 'fraction' of channels",
    ),
    "integers and Kronecker products": (
        INT4,
        COMPACTER,
        "nothing-to-train",
        "stages[1].heal.train",
        "no 16-bit matrices with sides that 'terms' divides",
    ),
    "terms that divide no side": (
        {"decompose": {"method": "svd", "keep": 0.6, "storage": "low_rank"}},
        {**COMPACTER, "terms": 37},
        "nothing-to-train",
        "stages[1].heal.train",
        "no 16-bit matrices with sides that 'terms' divides",
    ),
    "masks of integers": (
        {"quantize": {"method": "gqsa", "bits": 4, "group_size": 16}},
        LORA,
        "nothing-to-train",
        "stages[1].heal.train",
        "no matrix or mask that absorbs adapters",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_error(plan_stages: Callable[..., Any], case: str) -> None:
    first, train, code, where, words = BAD[case]
    ended = plan_stages(first, {"heal": options_for(train, "distill")})
    ended.refuses(2, words, code=code, where=where)
