"""Elastic checkpoints: one file, several budgets, each equal to factors that are cut by hand."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.elastic_runs import (
    BUDGETS,
    EVENLY_REFINED,
    REFINED,
    STAGES,
    SVD_LLM,
    block_of,
    component_bits,
    cut_by_hand,
    logits,
    ranks_of,
)
from tests.fresh_processes import FreshProcesses
from tests.shared_runs import Run, changed
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from lrc.compressors.heal import work
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError, Stopped
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(run_stages: Run) -> Run:
    """Checkpoints are compared with others that are computed on the CPU."""
    return partial(run_stages, device="cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_do_not_increase_and_every_budget_is_met(run: Run, stage: str) -> None:
    report, output = run({"decompose": STAGES[stage]})
    ranks = ranks_of(output / "checkpoint")
    assert ranks
    assert all(sorted(each, reverse=True) == each for each in ranks.values())
    assert all(len(each) == len(BUDGETS) for each in ranks.values())
    assert any(each[0] > each[-1] for each in ranks.values())
    assert ("model.layers.1.mlp.down_proj" in ranks) == (stage != "kfac")
    total = sum(layer["dense_bits"] for layer in report["layers"])
    for index, keep in enumerate(BUDGETS):
        bits = 0
        for layer in report["layers"]:
            record, stored = layer["config"], ranks.get(layer["name"])
            bits += layer["bits"]
            if stored:
                bits += component_bits(record, stored[index]) - component_bits(record, stored[0])
        assert keep - 0.12 < bits / total <= keep


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("index", range(len(BUDGETS)))
def test_every_budget_equals_factors_cut_by_hand(
    run: Run, sample: Tensor, tmp_path: Path, stage: str, index: int
) -> None:
    _, output = run({"decompose": STAGES[stage]})
    checkpoint = output / "checkpoint"
    expected = logits(cut_by_hand(checkpoint, tmp_path / "hand", index), sample)
    found = logits(checkpoint, sample, budget=BUDGETS[index])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if index:
        assert not torch.allclose(found, logits(checkpoint, sample), atol=1e-3)


@pytest.mark.parametrize("keep", BUDGETS)
def test_without_compensation_a_budget_is_the_dedicated_checkpoint(
    run: Run, lrc: Callable[..., Any], tmp_path: Path, keep: float
) -> None:
    _, output = run({"decompose": SVD_LLM})
    _, dedicated = run({"decompose": {"method": "svd-llm", "keep": keep}})
    assert lrc("export", output / "checkpoint", tmp_path / "out", "--keep", keep).code == 0
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", dedicated / "checkpoint")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}], ids=["lagrangian", "uniform"])
def test_the_smallest_budget_of_a_refinement_is_the_dedicated_checkpoint(
    run: Run, lrc: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    _, output = run({"decompose": {**REFINED, **options}})
    _, dedicated = run({"decompose": {"method": "kfac", "keep": BUDGETS[-1], **options}})
    ended = lrc("export", output / "checkpoint", tmp_path / "out", "--keep", BUDGETS[-1])
    assert ended.code == 0, ended.err
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", dedicated / "checkpoint")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", [SVD_LLM, REFINED], ids=["svd-llm", "refined"])
def test_the_file_is_that_of_the_largest_budget(run: Run, stage: dict[str, Any]) -> None:
    _, output = run({"decompose": stage})
    _, dedicated = run({"decompose": {"method": stage["method"], "keep": BUDGETS[0]}})
    ours, theirs = (
        sum(file.stat().st_size for file in (each / "checkpoint").glob("*.safetensors"))
        for each in (output, dedicated)
    )
    assert ours <= 1.1 * theirs
    assert block_of(output / "checkpoint")["elastic"] == {"version": 1, "budgets": BUDGETS}


@pytest.mark.parametrize("stage", STAGES)
def test_an_exported_budget_is_an_ordinary_checkpoint(
    run: Run, lrc: Callable[..., Any], sample: Tensor, tmp_path: Path, stage: str
) -> None:
    _, output = run({"decompose": STAGES[stage]})
    out = tmp_path / "out"
    ended = lrc("export", output / "checkpoint", out, "--keep", 0.7, "--json")
    assert ended.code == 0, ended.err
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    facts = {"format": "lrc", "path": str(out), "keep": 0.7, "notes": [], "bytes": size}
    assert json.loads(ended.out) == facts
    assert torch.equal(logits(out, sample), logits(output / "checkpoint", sample, budget=0.7))
    assert ranks_of(out) == {}
    assert "elastic" not in block_of(out)
    assert json.loads((out / "config.json").read_text())["budget"] is None
    inspected = lrc("inspect", out, "--verify", "--json")
    assert inspected.code == 0, inspected.err
    facts = json.loads(inspected.out)
    assert 0.6 < facts["totals"]["kept"] <= 0.7
    assert facts["elastic"] is None
    assert facts["evaluation"] is None  # measured for the largest budget
    files = [
        {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        for folder in (output / "checkpoint", out)
    ]
    assert files[0] - files[1] == {"README.md", "lrc/report.json"}
    assert files[1] <= files[0]
    again = lrc("export", out, tmp_path / "again", "--keep", 0.6)
    again.refuses(1, "not elastic", "compress with 'elastic'", code="not-elastic", where=str(out))


def test_a_saved_model_in_shards_is_exported(
    run: Run, lrc: Callable[..., Any], sample: Tensor, tmp_path: Path
) -> None:
    _, output = run({"decompose": SVD_LLM})
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len([*(tmp_path / "saved").glob("*.safetensors")]) > 1
    ended = lrc("export", tmp_path / "saved", tmp_path / "out", "--keep", 0.8)
    assert ended.code == 0, ended.err
    expected = logits(output / "checkpoint", sample, budget=0.8)
    assert torch.equal(logits(tmp_path / "out", sample), expected)


def test_offloaded_weights_are_not_cut(run: Run, tmp_path: Path) -> None:
    _, output = run({"decompose": SVD_LLM})
    places = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.embed_tokens": "cpu"}
    places |= {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(CheckpointError, match=r"model\.layers\.1.*offloaded.*lrc export") as caught:
        AutoModelForCausalLM.from_pretrained(
            output / "checkpoint", budget=0.7, device_map=places, offload_folder=tmp_path
        )
    assert caught.value.code == "offloaded-weight"


def test_plan_and_inspection_list_the_budgets(run: Run, lrc: Callable[..., Any]) -> None:
    _, output = run({"decompose": SVD_LLM})
    ended = lrc("plan", output.with_suffix(".yaml"))
    assert "elastic: can be cut to 0.9, 0.8, 0.7, 0.6" in ended.out
    ended = lrc("inspect", output / "checkpoint")
    assert "elastic: can be cut to 0.9, 0.8, 0.7, 0.6" in ended.out
    facts = json.loads(lrc("inspect", output / "checkpoint", "--json").out)
    assert facts["elastic"] == BUDGETS


def test_a_fresh_process_loads_a_budget(
    run: Run, sample: Tensor, tmp_path: Path, with_lrc: FreshProcesses
) -> None:
    _, output = run({"decompose": SVD_LLM})
    code = (
        "import lrc, sys, torch; from transformers import AutoModelForCausalLM as M; "
        "model = M.from_pretrained(sys.argv[1], budget=0.6, dtype=torch.float32); "
        "torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    tokens, found = tmp_path / "tokens.pt", tmp_path / "logits.pt"
    torch.save(sample, tokens)
    ended = with_lrc(code, output / "checkpoint", tokens, found)
    assert ended.returncode == 0, ended.stderr
    expected = logits(output / "checkpoint", sample, budget=0.6)
    torch.testing.assert_close(torch.load(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [SVD_LLM, REFINED], ids=["svd-llm", "refined"])
def test_a_saved_model_stays_elastic_unless_it_is_cut(
    run: Run, sample: Tensor, tmp_path: Path, stage: dict[str, Any]
) -> None:
    _, output = run({"decompose": stage})
    checkpoint = output / "checkpoint"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "whole")
    assert ranks_of(tmp_path / "whole") == ranks_of(checkpoint)
    expected = logits(checkpoint, sample, budget=0.7)
    assert torch.equal(logits(tmp_path / "whole", sample, budget=0.7), expected)
    cut = AutoModelForCausalLM.from_pretrained(checkpoint, budget=0.7)
    layers = {n: m for n, m in cut.named_modules() if isinstance(m, CompressedLinear)}
    for name, ranks in ranks_of(checkpoint).items():
        found = [c for c in layers[name].config.components if c.type == "low_rank"]
        assert [c.sizes["rank"] for c in found] == ([ranks[2]] if ranks[2] else [])
    cut.save_pretrained(tmp_path / "cut")
    assert ranks_of(tmp_path / "cut") == {}
    assert torch.equal(logits(tmp_path / "cut", sample), expected)
    dense = cut.dequantize()
    torch.testing.assert_close(
        dense.float()(sample).logits, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max())
    )


def test_the_decoder_alone_and_tokens_are_generated(run: Run, sample: Tensor) -> None:
    _, output = run({"decompose": SVD_LLM})
    checkpoint = output / "checkpoint"
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, budget=0.8)
    decoder = AutoModel.from_pretrained(checkpoint, budget=0.8)
    with torch.no_grad():
        states = whole.base_model(sample).last_hidden_state
        assert torch.equal(decoder(sample).last_hidden_state, states)
    assert whole.generate(sample[:1, :5], max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_a_dense_copy_has_no_budget(run: Run, lrc: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = run({"decompose": SVD_LLM})[1] / "checkpoint"
    out = tmp_path / "dense"
    assert lrc("export", checkpoint, out, "--format", "dense").code == 0
    config = json.loads((out / "config.json").read_text())
    assert config.keys().isdisjoint({"budget", "quantization_config"})


def test_a_checkpoint_with_one_budget_says_so(run: Run, tmp_path: Path) -> None:
    dedicated = run({"decompose": {"method": "svd-llm", "keep": 0.9}})[1] / "checkpoint"
    elastic = run({"decompose": SVD_LLM})[1] / "checkpoint"
    AutoModelForCausalLM.from_pretrained(dedicated).save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(elastic, budget=0.7).save_pretrained(tmp_path / "cut")
    for folder in (dedicated, tmp_path / "saved", tmp_path / "cut"):
        with pytest.raises(CheckpointError, match="not elastic and has only the size") as caught:
            AutoModelForCausalLM.from_pretrained(folder, budget=0.7)
        assert caught.value.code == "not-elastic"


@pytest.mark.parametrize("keep", [0.65, 0.5, 1, "all", True])
def test_a_budget_that_is_not_offered_is_refused(run: Run, keep: Any) -> None:
    _, output = run({"decompose": SVD_LLM})
    with pytest.raises(CheckpointError, match=r"one of 0\.9, 0\.8, 0\.7, 0\.6, got") as caught:
        AutoModelForCausalLM.from_pretrained(output / "checkpoint", budget=keep)
    assert caught.value.code == "unknown-budget"


def test_a_wrong_export_is_one_error(run: Run, lrc: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = run({"decompose": SVD_LLM})[1] / "checkpoint"
    plain = run({"decompose": {"method": "svd-llm", "keep": 0.9}})[1] / "checkpoint"
    out = tmp_path / "out"
    lrc("export", checkpoint, out).refuses(2, "--keep", "missing")
    ended = lrc("export", checkpoint, out, "--keep", 0.65)
    ended.refuses(1, "0.9, 0.8, 0.7, 0.6, got 0.65", code="unknown-budget")
    ended = lrc("export", plain, out, "--keep", 0.7)
    ended.refuses(1, "--keep", "not elastic", code="not-elastic", where=str(plain))
    lrc("export", tmp_path / "none", out, "--keep", 0.7).refuses(2, "no such folder")
    lrc("export", checkpoint, tmp_path, "--keep", 0.7).refuses(2, "exists already")
    inside = checkpoint / "inside"
    lrc("export", checkpoint, inside, "--keep", 0.7).refuses(2, "must not be inside")
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "lrc/plan.json").write_text("{}")
    lrc("export", damaged, out, "--keep", 0.7).refuses(1, "plan.json", code="changed-file")
    (damaged / "lrc/plan.json").unlink()
    lrc("export", damaged, out, "--keep", 0.7).refuses(1, "plan.json is missing")
    assert not out.exists()


HEAL = {"method": "distill", "steps": 40, "batch": 4, "rate": 1e-2, "held_out": 512}


@pytest.mark.parametrize("stage", [SVD_LLM, REFINED], ids=["svd-llm", "refined"])
def test_healing_lowers_the_loss_of_every_budget(
    run: Run, sample: Tensor, tmp_path: Path, stage: dict[str, Any]
) -> None:
    report, output = run({"decompose": stage}, {"heal": HEAL})
    (record,) = report["training"]
    assert record["kept"]
    assert [each["keep"] for each in record["budgets"]] == BUDGETS
    # On the tiny model the largest budget of a refinement is too close to the dense model to gain.
    gaining = record["budgets"][stage == REFINED :]
    assert all(each["after"] < 0.97 * each["before"] for each in gaining)
    for key in ("before", "after"):
        mean = sum(each[key] for each in record["budgets"]) / len(BUDGETS)
        assert record[key] == pytest.approx(mean, rel=1e-6)
    before = [each["before"] for each in record["budgets"]]
    assert before == sorted(before)  # the largest budget is the closest to the dense model
    _, plain = run({"decompose": stage})
    assert ranks_of(output / "checkpoint") == ranks_of(plain / "checkpoint")
    expected = logits(cut_by_hand(output / "checkpoint", tmp_path / "hand", 2), sample)
    found = logits(output / "checkpoint", sample, budget=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_healing_trains_the_integers_of_a_refinement(run: Run) -> None:
    _, plain = run({"decompose": REFINED})
    _, healed = run({"decompose": REFINED}, {"heal": HEAL})
    changed_names = changed(plain, healed)
    assert any(name.endswith("low_rank.b.weight_packed") for name in changed_names)
    _, scaled = run({"decompose": REFINED}, {"heal": {**HEAL, "method": "scales"}})
    kinds = {name.rpartition(".")[2] for name in changed(plain, scaled)}
    assert "weight_scale" in kinds
    assert "weight_packed" not in kinds


def test_healing_one_budget_serves_the_others_less(run: Run) -> None:
    """The mean over budgets is what training for all of them is better at."""
    report, _ = run({"decompose": SVD_LLM}, {"heal": HEAL})
    single, _ = run({"decompose": {"method": "svd-llm", "keep": 0.9}}, {"heal": HEAL})
    (ours,), (theirs,) = report["training"], single["training"]
    assert theirs["budgets"] == []
    largest = ours["budgets"][0]
    assert theirs["before"] == pytest.approx(largest["before"], rel=1e-6)
    assert theirs["after"] < largest["after"]


@pytest.mark.parametrize("stage", ["decompose", "heal"])
def test_an_interrupted_elastic_run_ends_with_the_same_bytes(
    run: Run,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    monkeypatch.setattr(work, "SNAPSHOT_SECONDS", 1e9)
    stages = [{"decompose": EVENLY_REFINED}, {"heal": {**HEAL, "steps": 12}}]
    _, undisturbed = run(*stages)
    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))
    name, number = ("heal", 7) if stage == "heal" else ("compress", 1)

    def stop(running: str, done: int, total: int) -> None:
        if (running, done) == (name, number):
            raise Stopped("stopped by a test")

    with pytest.raises(Stopped):
        compress(recipe, Machine("cpu", on_step=stop))
    compress(recipe, Machine("cpu"))
    for file in ("model.safetensors", "config.json", "lrc/plan.json"):
        ours, theirs = (each / "checkpoint" / file for each in (tmp_path / "run", undisturbed))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_plan_of_an_elastic_run_gives_its_largest_budget(
    run: Run, tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    _, output = run({"decompose": SVD_LLM})
    stage = {"decompose": {"method": "svd-llm", "plan": str(output / "plan.json")}}
    compress(load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[stage])))
    ours, theirs = (
        load_file(each / "checkpoint/model.safetensors") for each in (tmp_path / "run", output)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ranks_of(tmp_path / "run/checkpoint") == {}
