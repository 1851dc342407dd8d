"""Healing with adapters: they are merged into what is stored, and nothing else changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.heal import work
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

Run = Callable[..., tuple[dict[str, Any], Path]]

LORA = {"train": "lora", "rank": 4, "rate": 2e-2, "batch": 4, "held_out": 512}
DISTILL = {"method": "distill", "steps": 30, **LORA}
BLOCK = {"method": "block", "steps": 20, "samples": 16, **LORA}
INT4 = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}

FORMS: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"decompose": {"method": "svd", "keep": 0.6, "storage": "low_rank"}}],
    "shared low_rank": [{"decompose": {"method": "basis-sharing", "keep": 0.6}}],
    "pivoted_low_rank": [
        {"decompose": {"method": "svd", "keep": 0.6, "storage": "pivoted_low_rank"}}
    ],
    "sparse": [{"decompose": {"method": "magnitude", "keep": 0.6}}],
    "semi_structured": [{"decompose": {"method": "magnitude", "keep": 0.6, "pattern": "n:8"}}],
    "dictionary": [{"decompose": {"method": "dictionary", "keep": 0.6}}],
    "integers": [INT4],
    "asymmetric integers": [
        {"quantize": {"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False}}
    ],
    "quantized low_rank": [
        {"decompose": {"method": "svd", "keep": 0.6, "storage": "low_rank"}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
}
MIXED = [
    {"decompose": {"method": "svd", "keep": 0.6, "targets": ["*.mlp.*"]}},
    {"decompose": {"method": "magnitude", "keep": 0.6, "targets": ["*.q_proj", "*.k_proj"]}},
    {"quantize": {"method": "rtn", "bits": 4, "targets": ["*.o_proj"]}},
]


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread: None) -> None:
    """Two would mostly wait for each other."""


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path_factory: Any) -> Run:
    """Run stages on the tiny model; return the report and the output folder. Runs are shared."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def start(*stages: dict[str, Any]) -> Any:
        key = json.dumps(stages)
        if key not in done:
            output = tmp_path_factory.mktemp("adapters") / "run"
            recipe = tiny_recipe(tiny_model_folder, output, stages=[*stages])
            done[key] = compress(load_recipe(recipe)), output
        return done[key]

    return start


def tensors_of(output: Path) -> dict[str, Tensor]:
    return load_file(output / "checkpoint/model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of tensors that differ between two checkpoints of the same form."""
    ours, theirs = tensors_of(before), tensors_of(after)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [DISTILL, BLOCK], ids=["distill", "block"])
def test_every_stored_form_absorbs_its_adapters(
    run: Run, form: str, options: dict[str, Any]
) -> None:
    rate = 5e-3 if form.endswith("integers") else options["rate"]
    report, output = run(*FORMS[form], {"heal": {**options, "rate": rate}})
    (record,) = report["training"]
    assert record["kept"]
    assert record["after"] < 0.99 * record["before"]
    _, plain = run(*FORMS[form])
    names = changed(plain, output)
    assert names
    kinds = ("weight", "weight_packed", "values")
    assert all(name.endswith(kinds) and "norm" not in name for name in names)
    AutoModelForCausalLM.from_pretrained(output / "checkpoint")


@pytest.mark.parametrize("options", [DISTILL, BLOCK], ids=["distill", "block"])
def test_zero_steps_change_nothing(run: Run, options: dict[str, Any]) -> None:
    report, output = run(*MIXED, {"heal": {**options, "steps": 0}})
    (record,) = report["training"]
    assert not record["kept"]
    assert record["after"] == record["before"] > 0
    _, plain = run(*MIXED)
    assert changed(plain, output) == set()


def test_norms_scales_masks_and_embeddings_keep_their_bits(run: Run) -> None:
    report, output = run(*MIXED, {"heal": DISTILL})
    _, plain = run(*MIXED)
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


class Stopper:
    """Stops a run after a number of calls with the stage ``heal``."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.calls -= stage == "heal"
        if self.calls == 0 and stage == "heal":
            raise Stopped("stopped by a test")


ONE = {"rank": None, "rate": 1e-2}
CHAIN = [*MIXED, {"heal": {**BLOCK, "parts": "separate"}}, {"heal": DISTILL}]


def test_an_interrupted_run_ends_with_the_same_bytes(
    run: Run,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "SNAPSHOT_SECONDS", 0.0)
    report, undisturbed = run(*CHAIN)
    assert [each["kept"] for each in report["training"]] == [True, True]
    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=CHAIN))
    for calls in (1, 2, 7, 11):
        with pytest.raises(Stopped):
            compress(recipe, Machine(on_step=Stopper(calls)))
    again = compress(recipe)
    assert changed(undisturbed, tmp_path / "run") == set()
    trainable = [[each["trainable"] for each in done["training"]] for done in (report, again)]
    assert trainable[0] == trainable[1]


KEPT = {**DISTILL, "merge": False, "rate": 1e-2}


def test_adapters_of_integers_can_be_kept_as_components(
    run: Run, executed: Callable[[Path], Any]
) -> None:
    report, output = run(*MIXED, {"heal": KEPT}, {"heal": {**DISTILL, "train": "factors", **ONE}})
    first, second = report["training"]
    assert first["kept"]
    assert second["kept"]
    assert second["before"] == pytest.approx(first["after"], rel=1e-3)
    _, plain = run(*MIXED)
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


def test_adapters_that_do_not_help_are_not_kept(run: Run) -> None:
    report, output = run(*MIXED, {"heal": {**KEPT, "rate": 0.9, "steps": 2}})
    assert not report["training"][0]["kept"]
    _, plain = run(*MIXED)
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


def test_an_option_of_another_value_is_refused(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    heal = {"method": "distill", "train": "factors", "rank": 4}
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[INT4, {"heal": heal}])
    lrc("plan", recipe).refuses(
        2,
        "'rank' is an option of 'train: lora",
        "remove 'rank'",
        code="conflicting-keys",
        where="stages[1].heal",
    )
