"""Budgets, allocations, components and hand-edited plans, through the whole pipeline."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.cli.inspect import describe
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import WeightConfig
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.summary import WeightSummary, summarize
from lrc.configs.errors import OutputError, RecipeError, Stopped
from lrc.configs.load import load_recipe

STAGES: dict[str, dict[str, Any]] = {
    "by the lagrangian": {"method": "svd", "keep": 0.6, "allocation": "lagrangian"},
    "by one threshold": {"method": "svd", "keep": 0.6, "allocation": "heavy-tail"},
    "in multiples, with floors": {
        "method": "svd-llm",
        "keep": 0.6,
        "allocation": "lagrangian",
        "rank_multiple": 4,
        "min_keep": 0.3,
        "overrides": [{"match": "*.0.*.q_proj", "rank": 3}],
    },
    "pivot rows": {"method": "svd-llm", "keep": 0.6, "storage": "pivoted_low_rank"},
    "multiply-adds": {
        "method": "svd-llm",
        "keep": 0.6,
        "storage": "pivoted_low_rank",
        "measure": "macs",
        "allocation": "lagrangian",
    },
    "a shared basis": {"method": "basis-sharing", "keep": 0.6},
    "a shared basis by the lagrangian": {
        "method": "basis-sharing",
        "keep": 0.6,
        "allocation": "lagrangian",
    },
    "the recommended way": {"method": "kfac", "keep": 0.6, "compensate": {}},
    "pruned": {"method": "sparse", "keep": 0.6},
    "dictionaries": {"method": "dictionary", "keep": 0.6, "rounds": 3, "min_keep": 0.3},
    "a shared dictionary": {"method": "cospadi", "keep": 0.6, "rounds": 2, "layers_per_group": 2},
    "dictionaries of several ratios": {
        "method": "dictionary",
        "keep": 0.6,
        "rounds": 3,
        "ratio": [1.5, 3],
    },
    "chains of cores": {"method": "tensor-train", "keep": 0.6, "cores": 3, "rounds": 1},
    "sums": {"method": "mixed", "keep": 0.6, "components": ["pivoted_low_rank+sparse"]},
    "bytes, for sums": {
        "method": "mixed",
        "size": "90kB",
        "components": ["pivoted_low_rank+sparse", "sparse"],
    },
    "any component": {
        "method": "mixed",
        "keep": 0.6,
        "components": ["pivoted_low_rank", "sparse", "pivoted_low_rank+sparse", "dictionary"],
        "rounds": 3,
    },
    "bytes, uniform": {"method": "svd", "size": "90kB"},
    "bytes, by the lagrangian": {"method": "svd", "size": "90 kB", "allocation": "lagrangian"},
}


@pytest.fixture(scope="module")
def compressed(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Run a recipe of one stage once; return its output folder."""
    done: dict[str, Path] = {}

    def run(stage: dict[str, Any]) -> Path:
        key = json.dumps(stage)
        if key not in done:
            output = tmp_path_factory.mktemp("plans") / "run"
            recipe = tiny_recipe(tiny_model_folder, output, stages=[{"decompose": stage}])
            compress(load_recipe(recipe), Machine(device="cpu"))
            done[key] = output
        return done[key]

    return run


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def rows_of(executed: Callable[[Path], Plan]) -> Callable[[Path], dict[str, WeightSummary]]:
    return lambda run: {row.name: row for row in summarize(executed(run))}


def tensors_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint/model.safetensors")


def modules_of(run: Path) -> dict[str, WeightConfig]:
    config = json.loads((run / "checkpoint/config.json").read_text())
    modules = config["quantization_config"]["modules"]
    return {name: WeightConfig.from_json(record) for name, record in modules.items()}


def shown_by_inspect(run: Path) -> dict[str, WeightConfig]:
    modules = describe(run / "checkpoint", verify=True)["modules"]
    keys = ("shape", "components", "bias")
    return {m["name"]: WeightConfig.from_json({k: m[k] for k in keys if k in m}) for m in modules}


@pytest.mark.parametrize("case", STAGES)
def test_the_checkpoint_computes_the_products_of_its_factors(
    case: str,
    compressed: Callable[..., Path],
    weights_of: Callable[[Path], dict[str, Tensor]],
    tiny_model_folder: Path,
    sample: Tensor,
) -> None:
    run = compressed(STAGES[case])
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.bfloat16())
        for name, weight in weights_of(run).items():
            dense.get_submodule(name).weight.copy_(weight)
        expected = dense(sample).logits
        model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
        logits = model.eval()(sample).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("case", STAGES)
def test_the_budget_is_kept_and_used(
    case: str, compressed: Callable[..., Path], executed: Callable[[Path], Plan]
) -> None:
    stage, run = STAGES[case], compressed(STAGES[case])
    report = json.loads((run / "report.json").read_text())
    plan = executed(run)
    assert plan.modules()
    if "size" in stage:
        size = (run / "checkpoint/model.safetensors").stat().st_size
        assert size <= 90_000
        for allocation in plan.allocations:
            assert 0.99 * allocation.budget < plan.bits <= allocation.budget
        if "components" not in stage:  # the header is reserved for the longest names
            assert size > 0.95 * 90_000
    elif stage.get("measure") != "macs":
        # Equal fractions are rounded down per weight; an allocation spends all but one step.
        slack = 0.1 if "allocation" not in stage else 0.03
        assert stage["keep"] - slack < report["size"]["targeted"]["kept"] <= stage["keep"]
    tensors = sum(t.numel() * t.element_size() for t in tensors_of(run).values())
    written = json.loads((run / "checkpoint/lrc/plan.json").read_text())
    assert tensors == plan.compressed_bytes == written["totals"]["compressed_bytes"]
    assert not any(task.pending for task in plan.tasks)


def test_multiples_floors_and_overrides_are_honoured(
    compressed: Callable[..., Path], rows_of: Callable[[Path], dict[str, WeightSummary]]
) -> None:
    for name, row in rows_of(compressed(STAGES["in multiples, with floors"])).items():
        if name == "model.layers.0.self_attn.q_proj":
            assert row.rank == 3
        elif row.rank is not None:
            assert row.rank % 4 == 0
            assert row.bits >= 0.3 * row.dense_bits


def test_the_lagrangian_loses_least_in_sum(
    compressed: Callable[..., Path], weights_of: Callable[[Path], dict[str, Tensor]]
) -> None:
    """Of the three allocations of one budget, by the squared error of the weights."""

    def lost(stage: dict[str, Any]) -> float:
        run = compressed(stage)
        source = Path(json.loads((run / "report.json").read_text())["recipe"]["model"]["path"])
        dense = load_file(source / "model.safetensors")
        return sum(
            float((dense[f"{name}.weight"] - W_hat).square().sum())
            for name, W_hat in weights_of(run).items()
        )

    least = lost(STAGES["by the lagrangian"])
    assert least < lost(STAGES["by one threshold"])
    assert least < lost({"method": "svd", "keep": 0.6})


def test_layers_of_a_group_store_one_basis(compressed: Callable[..., Path]) -> None:
    run = compressed(STAGES["a shared basis"])
    modules = modules_of(run)
    owner, member = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    assert (modules[owner].types, modules[owner].shares) == ("low_rank", None)
    (component,) = modules[owner].components
    assert modules[member].components == (replace(component, shares=owner),)
    assert f"{member}.low_rank.a.weight" not in tensors_of(run)


def test_layers_of_a_group_store_one_dictionary(
    compressed: Callable[..., Path], rows_of: Callable[[Path], dict[str, WeightSummary]]
) -> None:
    run = compressed(STAGES["a shared dictionary"])
    modules, rows, stored = modules_of(run), rows_of(run), tensors_of(run)
    owner, member = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    assert (modules[owner].types, modules[owner].shares) == ("dictionary", None)
    (component,) = modules[owner].components
    assert modules[member].components == (replace(component, shares=owner),)
    assert f"{member}.dictionary.a.weight" not in stored
    leaves = {name: t for name, t in stored.items() if name.startswith((owner, member))}
    bits = sum(8 * t.numel() * t.element_size() for t in leaves.values())
    assert bits == rows[owner].bits + rows[member].bits
    assert shown_by_inspect(run) == modules


def test_a_group_of_one_dictionary_gives_the_same_bytes(compressed: Callable[..., Path]) -> None:
    stage = {"method": "cospadi", "keep": 0.6, "rounds": 2}
    runs = [compressed(each) for each in (stage, {**stage, "layers_per_group": 1})]
    one, other = ((run / "checkpoint/model.safetensors").read_bytes() for run in runs)
    assert one == other


@pytest.mark.parametrize(
    "case",
    [
        "by the lagrangian",
        "pivot rows",
        "a shared basis",
        "a shared dictionary",
        "the recommended way",
        "bytes, by the lagrangian",
        "pruned",
        "sums",
        "any component",
    ],
)
def test_a_plan_given_back_gives_the_same_weights(
    case: str, compressed: Callable[..., Path]
) -> None:
    first = compressed(STAGES[case])
    again = compressed({**STAGES[case], "plan": str(first / "plan.json")})
    weights = "checkpoint/model.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()
    given = again / "checkpoint/lrc/plan.given.0.json"
    assert given.read_bytes() == (first / "plan.json").read_bytes()


def of_name(tasks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the tasks of a plan file, of one weight each, by its name."""
    return {weight["name"]: task for task in tasks for weight in task["weights"]}


def write_minimal(file: Path, configs: dict[str, WeightConfig]) -> None:
    """Write a plan file with only what is read of it, and a comment."""
    tasks = [{"weights": [{"name": n}], "config": c.to_json()} for n, c in configs.items()]
    file.write_text(json.dumps({"version": 2, "tasks": tasks, "comment": "mine"}))


def test_an_edited_plan_is_carried_out(
    compressed: Callable[..., Path],
    rows_of: Callable[[Path], dict[str, WeightSummary]],
    tmp_path: Path,
) -> None:
    plan = json.loads((compressed(STAGES["pivot rows"]) / "plan.json").read_text())
    edits = {"q_proj": [{"type": "low_rank", "rank": 5}], "up_proj": []}
    configs = {
        name: WeightConfig.from_json(
            {
                "shape": task["config"]["shape"],
                "components": edits.get(name.rpartition(".")[2], task["config"]["components"]),
            }
        )
        for name, task in of_name(plan["tasks"]).items()
    }
    file = tmp_path / "edited.json"
    write_minimal(file, configs)
    run = compressed({"method": "svd-llm", "plan": str(file)})
    rows = rows_of(run)
    assert {name: row.config for name, row in rows.items()} == configs
    assert shown_by_inspect(run) == {n: c for n, c in configs.items() if c.compressed}
    assert rows["model.layers.0.mlp.up_proj"].note == "dense in the given plan"


def test_a_plan_may_name_any_component_of_a_mixed_method(
    compressed: Callable[..., Path],
    rows_of: Callable[[Path], dict[str, WeightSummary]],
    tmp_path: Path,
) -> None:
    stage = STAGES["any component"]
    plan = json.loads((compressed(stage) / "plan.json").read_text())
    kinds: list[list[dict[str, Any]]] = [
        [{"type": "sparse", "nonzeros": 300}],
        [{"type": "dictionary", "atoms": 12, "nonzeros": 5}],
        [{"type": "pivoted_low_rank", "rank": 2}, {"type": "sparse", "nonzeros": 200}],
        [{"type": "pivoted_low_rank", "rank": 5}],
        [],
    ]
    requested = {
        name: WeightConfig.from_json(
            {"shape": task["config"]["shape"], "components": kinds[number % len(kinds)]}
        )
        for number, (name, task) in enumerate(of_name(plan["tasks"]).items())
    }
    file = tmp_path / "edited.json"
    write_minimal(file, requested)
    run = compressed({**stage, "plan": str(file)})
    assert shown_by_inspect(run) == {n: c for n, c in requested.items() if c.compressed}
    rows = rows_of(run).values()
    assert all(row.result.predicted_nats for row in rows if row.config.compressed)


def test_a_plan_that_was_edited_since_is_another_run(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], compressed: Any, tmp_path: Path
) -> None:
    stage = {"method": "svd", "keep": 0.6, "allocation": "lagrangian"}
    file = tmp_path / "plan.json"
    text = (compressed(stage) / "plan.json").read_text()
    file.write_text(text)
    stages = [{"decompose": {"method": "svd", "plan": str(file)}}]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    compress(load_recipe(recipe), Machine(device="cpu"))
    file.write_text(text + " ")
    (tmp_path / "run/report.json").unlink()
    with pytest.raises(OutputError, match="holds a run that differs in user_plans"):
        compress(load_recipe(recipe), Machine(device="cpu"))


def test_a_run_stopped_during_allocation_continues_with_the_next_layer(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], compressed: Any, tmp_path: Path
) -> None:
    stage = {**STAGES["by the lagrangian"], "method": "svd-llm"}
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[{"decompose": stage}])
    seen: list[tuple[str, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if seen.count((stage, done)) == 1 and stage == "allocate":
            raise Stopped("requested")

    for _ in range(2):
        with pytest.raises(Stopped):
            compress(load_recipe(recipe), Machine(device="cpu", on_step=stop))
    energies = tmp_path / "run/work/energies"
    stamps = {file: file.stat().st_mtime_ns for file in energies.iterdir()}
    assert len(stamps) == 2
    compress(load_recipe(recipe), Machine(device="cpu", on_step=stop))
    assert [n for s, n in seen if s == "allocate"] == [1, 1, 2, 1, 2]
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (compressed(stage) / weights).read_bytes()


def test_a_budget_that_only_the_weights_show_to_be_too_small_is_refused(
    tiny_llama: Any,
    make_tokenizer: Any,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """With all singular values alike, one threshold keeps them all: dense."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for leaf in ("q_proj", "o_proj"):
                getattr(layer.self_attn, leaf).weight.copy_(torch.eye(32))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    stage = {"method": "svd", "keep": 0.3, "allocation": "heavy-tail", "targets": ["*q_*", "*o_*"]}
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "run", stages=[{"decompose": stage}])
    with pytest.raises(RecipeError) as refused:
        compress(load_recipe(recipe), Machine(device="cpu"))
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == ("infeasible-budget", "stages[0].decompose.keep")
