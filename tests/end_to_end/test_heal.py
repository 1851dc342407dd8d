"""Healing: what is trained gets better on text that is held out, and nothing else changes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.heal_stages import BLOCK, DISTILL, INT4, MIXED, STORED
from tests.shared_runs import Run, Stopper, changed, tensors_of
from transformers import AutoModelForCausalLM

from lrc.compressors.heal import work
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import COMPONENTS, CompressedLinear
from lrc.compressors.pipeline import compress
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


FORMS: dict[str, list[dict[str, Any]]] = {
    **STORED,
    "low_rank with a bias": [{"decompose": {"method": "lord", "keep": 0.6}}],
    "sparse 2:4": [{"decompose": {"method": "magnitude", "keep": 0.6, "pattern": "2:4"}}],
    "shared dictionary": [
        {"decompose": {"method": "cospadi", "keep": 0.6, "rounds": 1, "layers_per_group": 2}}
    ],
    "dense": [INT4],
    "dense, asymmetric": [
        {"quantize": {"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False}}
    ],
    "dense, correction": [
        {"quantize": {"method": "rtn", "bits": 2, "low_rank_correction": {"rank": 4}}}
    ],
    "block_sparse": [{"quantize": {"method": "gqsa", "bits": 4, "group_size": 16}}],
    "quantized pivoted_low_rank": [
        {"decompose": {"method": "svd", "keep": 0.6, "storage": "pivoted_low_rank"}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
    "quantized sparse": [
        {"decompose": {"method": "magnitude", "keep": 0.6}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
    "quantized semi_structured": [
        {"decompose": {"method": "magnitude", "keep": 0.6, "pattern": "n:8"}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
    "quantized dictionary": [
        {"decompose": {"method": "dictionary", "keep": 0.6}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
    "quantized embedding": [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 16, "embeddings": "int8"}}
    ],
    "sliced": [{"slice": {"method": "modegpt", "keep": 0.9}}],
    "sliced, with widths of calibration": [
        {"slice": {"method": "modegpt", "keep": 0.97, "uniform": False, "width_multiple": 1}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
    "sliced, with bases of blocks": [
        {"slice": {"method": "slicegpt", "keep": 0.95, "rotations": "block"}},
        {"quantize": {"method": "rtn", "bits": 4}},
    ],
}


BY_BLOCK = [
    "shared low_rank",
    "dictionary",
    "tensor_train",
    "quantized low_rank",
    "low_rank with a bias",
    "dense, asymmetric",
    "dense, correction",
    "block_sparse",
    "quantized pivoted_low_rank",
    "quantized sparse",
    "quantized semi_structured",
    "sliced, with widths of calibration",
]
# Types of which there is one form are trained by both methods, as all types are.
BY_DISTILL = ["tensor_train", "block_sparse", *(name for name in FORMS if name not in BY_BLOCK)]


@pytest.mark.parametrize("forms", [BY_DISTILL, BY_BLOCK], ids=["distill", "block"])
def test_every_component_type_is_among_the_forms(forms: list[str]) -> None:
    assert {*COMPONENTS} <= {name.split(",")[0].split()[-1] for name in forms}


@pytest.mark.parametrize(
    ("form", "options"),
    [*((form, DISTILL) for form in BY_DISTILL), *((form, BLOCK) for form in BY_BLOCK)],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)
def test_every_stored_form_trains_and_is_saved(
    run_stages: Run, form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    report, output = run_stages(*FORMS[form], {"heal": options})
    (record,) = report["training"]
    assert record["kept"]
    assert record["after"] < 0.99 * record["before"]
    _, plain = run_stages(*FORMS[form])
    names = changed(plain, output)
    assert names
    before = tensors_of(plain)
    assert all(before[name].is_floating_point() for name in names)
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("options", [DISTILL, BLOCK], ids=["distill", "block"])
def test_zero_steps_change_nothing(run_stages: Run, options: dict[str, Any]) -> None:
    report, output = run_stages(INT4, {"heal": {**options, "steps": 0}})
    (record,) = report["training"]
    assert not record["kept"]
    assert record["after"] == record["before"] > 0
    _, plain = run_stages(INT4)
    assert changed(plain, output) == set()


def test_a_result_that_is_no_better_is_not_used(run_stages: Run) -> None:
    report, output = run_stages(INT4, {"heal": {**DISTILL, "steps": 2, "rate": 0.9}})
    (record,) = report["training"]
    assert not record["kept"]
    assert record["best_step"] == 0
    _, plain = run_stages(INT4)
    assert changed(plain, output) == set()


@pytest.mark.parametrize("method", ["distill", "block"])
@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("all", ("low_rank", "values", "_scale", "norm", "v_proj")),
        ("factors", ("low_rank",)),
        ("values", ("values",)),
        ("scales", ("_scale", "norm")),
        ("norms", ("norm",)),
    ],
)
def test_what_is_not_trained_keeps_its_bits(
    run_stages: Run, method: str, train: str, trained: tuple[str, ...]
) -> None:
    options = DISTILL if method == "distill" else BLOCK
    report, output = run_stages(*MIXED, {"heal": {**options, "train": train}})
    assert report["training"][0]["kept"]
    _, plain = run_stages(*MIXED)
    names = changed(plain, output)
    for kind in trained:
        assert any(kind in name for name in names), kind
    assert all(any(kind in name for kind in trained) for name in names)


MASKED = {
    name: FORMS[name]
    for name in ("sparse", "sparse 2:4", "semi_structured", "dictionary", "shared dictionary")
}


@pytest.mark.parametrize(
    ("form", "options"),
    [*((form, DISTILL) for form in MASKED), ("sparse", BLOCK), ("shared dictionary", BLOCK)],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)
def test_values_change_their_places_but_not_their_number(
    run_stages: Run, form: str, options: dict[str, Any]
) -> None:
    moving = {"train": "values", "support": "moving", "rate": 0.05}
    report, output = run_stages(*MASKED[form], {"heal": {**options, **moving}})
    (record,) = report["training"]
    assert record["kept"]
    assert record["after"] < 0.99 * record["before"]
    fits = [fit for layer in record.get("layers", []) for fit in layer["fits"]] or [record]
    assert all(fit["moved"] > 0 for fit in fits)
    _, plain = run_stages(*MASKED[form])
    names = changed(plain, output)
    assert {name.rpartition(".")[2] for name in names} <= {"values", "mask", "index"}
    assert any(not name.endswith("values") for name in names)
    before, after = tensors_of(plain), tensors_of(output)
    assert all(before[name].shape == after[name].shape for name in before)
    # Loading verifies the masks.
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    assert bool(model(torch.arange(40)[None]).logits.isfinite().all())


def test_zero_steps_move_nothing(run_stages: Run) -> None:
    moving = {"train": "values", "support": "moving", "steps": 0}
    for options in (DISTILL, BLOCK):
        report, output = run_stages(*MASKED["sparse"], {"heal": {**options, **moving}})
        assert report["training"][0]["after"] == report["training"][0]["before"]
        _, plain = run_stages(*MASKED["sparse"])
        assert changed(plain, output) == set()


def test_stages_go_on_from_places_that_have_moved(run_stages: Run) -> None:
    moving = {"train": "values", "support": "moving", "rate": 0.05}
    first = [*MASKED["sparse"], {"heal": {**BLOCK, **moving, "parts": "separate"}}]
    earlier, _ = run_stages(*first)
    later, _ = run_stages(*first, {"heal": {**DISTILL, "rate": 1e-3}})
    again, _ = run_stages(*first, {"heal": {**DISTILL, **moving}})
    for report in (later, again):
        before, after = report["training"]
        assert before["after"] == earlier["training"][0]["after"]
        assert after["before"] == pytest.approx(before["after"], rel=1e-3)
        assert after["kept"]


def test_scales_is_distillation_of_scales(run_stages: Run) -> None:
    _, ours = run_stages(INT4, {"heal": {**DISTILL, "method": "scales"}})
    _, theirs = run_stages(INT4, {"heal": {**DISTILL, "train": "scales"}})
    assert changed(ours, theirs) == set()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "both"])
def test_every_divergence_lowers_the_loss(run_stages: Run, divergence: str) -> None:
    report, _ = run_stages(INT4, {"heal": {**DISTILL, "divergence": divergence}})
    assert report["training"][0]["kept"]


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_recomputation_gives_the_same_bytes(run_stages: Run, hidden: float) -> None:
    _, ours = run_stages(INT4, {"heal": {**DISTILL, "hidden": hidden}})
    _, theirs = run_stages(INT4, {"heal": {**DISTILL, "hidden": hidden, "checkpointing": True}})
    assert changed(ours, theirs) == set()


@pytest.mark.parametrize(
    "before", [INT4, {"slice": {"method": "modegpt", "keep": 0.9}}], ids=["integers", "sliced"]
)
def test_hidden_states_change_the_loss(run_stages: Run, before: dict[str, Any]) -> None:
    report, ours = run_stages(before, {"heal": {**DISTILL, "hidden": 1.0}})
    assert report["training"][0]["kept"]
    _, theirs = run_stages(before, {"heal": DISTILL})
    assert changed(ours, theirs)


def test_hidden_states_of_another_residual_stream_are_refused(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    for method in ("slicegpt", "drop"):
        stages = [
            {"slice": {"method": method, "keep": 0.9}},
            {"heal": {**DISTILL, "hidden": 1.0}},
        ]
        recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
        lrc("plan", recipe).refuses(2, f"slice.method: {method}", where="stages[1].heal.hidden")


def test_attention_and_mlp_are_fitted_one_after_the_other(run_stages: Run) -> None:
    report, _ = run_stages(INT4, {"heal": {**BLOCK, "parts": "separate"}})
    (record,) = report["training"]
    assert record["kept"]
    fits = [[fit["part"] for fit in layer["fits"]] for layer in record["layers"]]
    assert fits == [["self_attn", "layer"]] * 2
    for layer in record["layers"]:
        for fit in layer["fits"]:
            losses = dict(map(tuple, fit["losses"]))
            assert losses[fit["best_step"]] < losses[0]


def test_stages_go_on_from_each_other(run_stages: Run) -> None:
    report, output = run_stages(INT4, {"heal": BLOCK}, {"heal": {**DISTILL, "rate": 1e-3}})
    block, distill = report["training"]
    assert distill["after"] < distill["before"] < block["before"]
    assert distill["before"] == pytest.approx(block["after"], rel=0.05)
    _, single = run_stages(INT4, {"heal": DISTILL})
    assert changed(single, output)


def test_the_report_says_what_was_done(run_stages: Run) -> None:
    report, output = run_stages(INT4, {"heal": {**DISTILL, "steps": None, "tokens": 4000}})
    (record,) = report["training"]
    assert record["steps"] == 16  # of 256 tokens
    assert record["tokens"] == 4096
    assert record["text"]["held_out_tokens"] == 512
    assert record["text"]["training_tokens"] == 4096
    assert record["warning"] is None
    assert record["seconds"] > 0
    assert record["peak_bytes"] > 1e6
    assert record["tokens_per_second"] > 0
    assert [step for step, _ in record["losses"]] == list(range(17))
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    scales = sum(
        p.numel()
        for layer in model.modules()
        if isinstance(layer, CompressedLinear)
        for p in layer.parameters()
    )
    # A plain checkpoint has no layers of lrc; its scales are the same.
    named = tensors_of(output)
    stored = sum(t.numel() for name, t in named.items() if "_scale" in name or "norm" in name)
    assert record["trainable"] == (scales or stored)


@pytest.mark.parametrize("options", [DISTILL, BLOCK], ids=["distill", "block"])
def test_a_limit_of_the_time_is_a_budget(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(work, "SNAPSHOT_SECONDS", 0.0)
    stages = [INT4, {"heal": {**options, "steps": None, "minutes": 0.01}}]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    ended = lrc("plan", recipe)
    assert ended.code == 0, ended.err
    assert f"heal, {options['method']}: 0.01 minutes" in ended.out
    assert "heal 1 s" in ended.out
    with pytest.raises(Stopped):
        compress(load_recipe(recipe), Machine(on_step=Stopper(1)))
    (record,) = compress(load_recipe(recipe))["training"]
    assert record["minutes"] == 0.01
    fits = [fit for layer in record.get("layers", []) for fit in layer["fits"]] or [record]
    assert len(fits) in (1, 2)
    for fit in fits:
        assert fit["losses"][-1][0] == fit["steps"] >= 1
    assert record["tokens"] == 256 * record["steps"]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_the_same_values_up_to_rounding(
    run_stages: Run, micro_batch: int
) -> None:
    few = {**DISTILL, "steps": 3, "rate": 1e-3}
    expected, _ = run_stages(INT4, {"heal": few})
    found, _ = run_stages(INT4, {"heal": {**few, "micro_batch": micro_batch}})
    for ours, theirs in zip(
        found["training"][0]["losses"], expected["training"][0]["losses"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_plan_shows_the_budget(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    stages = [INT4, {"heal": BLOCK}, {"heal": DISTILL}]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    ended = lrc("plan", recipe)
    assert ended.code == 0, ended.err
    assert "heal, block: 20 steps, 5,120 tokens through every layer" in ended.out
    assert "heal, distill: 30 steps, 7,680 tokens" in ended.out
    assert re.search(r"heal [1-9]\d* s", ended.out)  # at least the time to load both models
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["llama-tied", "mistral", "gemma3", "opt", "gpt-neox", "llama-bare-tied", "qwen2-float16"],
)
def test_every_family_heals(
    families: Callable[[str], Any],
    write_recipe: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    name: str,
) -> None:
    family = families(name)
    block = {**BLOCK, "steps": 10, "parts": "separate", "rate": 5e-3}
    recipe = write_recipe(
        tmp_path,
        family.source,
        model={"path": str(family.source), "dtype": family.family.dtype},
        calibration={"source": str(tiny_text), "samples": 4, "length": 64},
        stages=[
            {"decompose": {"method": "svd", "keep": 0.5}},
            {"heal": block},
            {"heal": {**DISTILL, "steps": 10, "rate": 5e-3}},
        ],
    )
    first, second = compress(load_recipe(recipe))["training"]
    assert [len(layer["fits"]) for layer in first["layers"]] == [2, 2]
    assert first["kept"]
    assert second["kept"]
    assert second["after"] < second["before"] < first["before"]
    dtype = getattr(torch, family.family.dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_small_singular_values_are_removed_after_a_nuclear_norm(run_stages: Run) -> None:
    options = {**DISTILL, "nuclear_norm": 1e-6, "truncate": 0.6}
    report, output = run_stages(*STORED["low_rank"], {"heal": options})
    before, _ = run_stages(*STORED["low_rank"])
    (record,) = report["training"]
    assert record["ranks"]
    assert record["after"] < record["before"]
    assert report["size"]["targeted"]["kept"] < before["size"]["targeted"]["kept"]
    assert AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    config = json.loads((output / "checkpoint/config.json").read_text())["quantization_config"]
    tensors = tensors_of(output)
    for name, rank in record["ranks"].items():
        (component,) = config["modules"][name]["components"]
        assert component["rank"] == rank == len(tensors[f"{name}.low_rank.a.weight"])
