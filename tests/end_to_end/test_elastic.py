"""Elastic checkpoints: one file, several budgets, each equal to factors that are cut by hand."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.shared_runs import Run
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from lrc.compressors.heal import work
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError, Stopped
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGETS = [0.9, 0.8, 0.7, 0.6]
SVD_LLM = {"method": "svd-llm", "elastic": BUDGETS}
KFAC = {
    "method": "kfac",
    "storage": "low_rank",
    "elastic": BUDGETS,
    "compensate": {},
    "overrides": [{"match": "*.1.mlp.down_proj", "rank": 7}],
}
STAGES = {"svd-llm": SVD_LLM, "kfac": KFAC}


@pytest.fixture(scope="module")
def run(run_stages: Run) -> Run:
    """Checkpoints are compared with others that are computed on the CPU."""
    return partial(run_stages, device="cpu")


def block_of(folder: Path) -> dict[str, Any]:
    """Return the block of lrc in the config of a checkpoint."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]


def ranks_of(folder: Path) -> dict[str, list[int]]:
    """Return the table of ranks: name of a layer -> rank at every budget."""
    modules = block_of(folder)["modules"]
    return {
        name: record["components"][0]["ranks"]
        for name, record in modules.items()
        if "ranks" in record["components"][0]
    }


def cut_by_hand(folder: Path, out: Path, index: int) -> Path:
    """Write an ordinary checkpoint of truncated factors, without the code that is tested."""
    out.mkdir()
    ranks = ranks_of(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, all_ranks in ranks.items():
        a, b = f"{name}.low_rank.a.weight", f"{name}.low_rank.b.weight"
        tensors[a] = tensors[a][: all_ranks[index]].contiguous()
        tensors[b] = tensors[b][:, : all_ranks[index]].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["budget"], config["quantization_config"]["elastic"]
    for name, all_ranks in ranks.items():
        component = config["quantization_config"]["modules"][name]["components"][0]
        component["rank"] = all_ranks[index]
        del component["ranks"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@torch.no_grad()
def logits(folder: Path, sample: Tensor, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    found: Tensor = model(sample).logits
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_do_not_increase_and_every_budget_is_met(run: Run, stage: str) -> None:
    report, output = run({"decompose": STAGES[stage]})
    ranks = ranks_of(output / "checkpoint")
    assert ranks
    assert all(sorted(each, reverse=True) == each for each in ranks.values())
    assert all(len(each) == len(BUDGETS) for each in ranks.values())
    assert any(each[0] > each[-1] for each in ranks.values())
    assert ("model.layers.1.mlp.down_proj" in ranks) == (stage == "svd-llm")
    total = sum(layer["dense_bits"] for layer in report["layers"])
    for index, keep in enumerate(BUDGETS):
        bits = 0
        for layer in report["layers"]:
            d_out, d_in = layer["config"]["shape"]
            stored = ranks.get(layer["name"])
            bits += layer["bits"]
            if stored:
                bits -= (stored[0] - stored[index]) * (d_out + d_in) * 16
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


def test_the_file_is_that_of_the_largest_budget(run: Run) -> None:
    _, output = run({"decompose": SVD_LLM})
    _, dedicated = run({"decompose": {"method": "svd-llm", "keep": BUDGETS[0]}})
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
    assert "budget" not in json.loads((out / "config.json").read_text())
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


def test_a_fresh_process_loads_a_budget(run: Run, sample: Tensor, tmp_path: Path) -> None:
    _, output = run({"decompose": SVD_LLM})
    code = (
        "import lrc, sys, torch; from transformers import AutoModelForCausalLM as M; "
        "model = M.from_pretrained(sys.argv[1], budget=0.6, dtype=torch.float32); "
        "torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    tokens, found = tmp_path / "tokens.pt", tmp_path / "logits.pt"
    torch.save(sample, tokens)
    subprocess.run(
        [sys.executable, "-c", code, output / "checkpoint", tokens, found],
        check=True,
        env=dict(os.environ),
    )
    expected = logits(output / "checkpoint", sample, budget=0.6)
    torch.testing.assert_close(torch.load(found), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_model_stays_elastic_unless_it_is_cut(
    run: Run, sample: Tensor, tmp_path: Path
) -> None:
    _, output = run({"decompose": SVD_LLM})
    checkpoint = output / "checkpoint"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "whole")
    assert ranks_of(tmp_path / "whole") == ranks_of(checkpoint)
    expected = logits(checkpoint, sample, budget=0.7)
    assert torch.equal(logits(tmp_path / "whole", sample, budget=0.7), expected)
    cut = AutoModelForCausalLM.from_pretrained(checkpoint, budget=0.7)
    ranks = {name: each[2] for name, each in ranks_of(checkpoint).items()}
    layers = {n: m for n, m in cut.named_modules() if isinstance(m, CompressedLinear)}
    assert {n: layer.config.sizes["rank"] for n, layer in layers.items()} == ranks
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


def test_healing_lowers_the_loss_of_every_budget(run: Run, sample: Tensor, tmp_path: Path) -> None:
    report, output = run({"decompose": SVD_LLM}, {"heal": HEAL})
    (record,) = report["training"]
    assert record["kept"]
    assert [each["keep"] for each in record["budgets"]] == BUDGETS
    assert all(each["after"] < 0.97 * each["before"] for each in record["budgets"])
    for key in ("before", "after"):
        mean = sum(each[key] for each in record["budgets"]) / len(BUDGETS)
        assert record[key] == pytest.approx(mean, rel=1e-6)
    before = [each["before"] for each in record["budgets"]]
    assert before == sorted(before)  # the largest budget is the closest to the dense model
    _, plain = run({"decompose": SVD_LLM})
    assert ranks_of(output / "checkpoint") == ranks_of(plain / "checkpoint")
    expected = logits(cut_by_hand(output / "checkpoint", tmp_path / "hand", 3), sample)
    found = logits(output / "checkpoint", sample, budget=0.6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    stages = [{"decompose": KFAC}, {"heal": HEAL}]
    _, undisturbed = run(*stages)
    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))
    name, number = ("heal", 17) if stage == "heal" else ("compress", 1)

    def stop(running: str, done: int, total: int) -> None:
        if (running, done) == (name, number):
            raise Stopped("stopped by a test")

    with pytest.raises(Stopped):
        compress(recipe, Machine("cpu", on_step=stop))
    compress(recipe, Machine("cpu"))
    for file in ("model.safetensors", "config.json", "lrc/plan.json"):
        ours, theirs = (each / "checkpoint" / file for each in (tmp_path / "run", undisturbed))
        assert ours.read_bytes() == theirs.read_bytes()


BAD: dict[str, tuple[list[dict[str, Any]], str, str, tuple[str, ...]]] = {
    "a budget above 1": (
        [{"decompose": {**SVD_LLM, "elastic": [1.2, 0.8]}}],
        "",
        "stages[0].decompose.elastic[0]",
        ("<= 1, got 1.2",),
    ),
    "a budget of 0": (
        [{"decompose": {**SVD_LLM, "elastic": [0.8, 0]}}],
        "",
        "stages[0].decompose.elastic[1]",
        ("got 0",),
    ),
    "a budget of 1": (
        [{"decompose": {**SVD_LLM, "elastic": [1, 0.8]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("'elastic' must list budgets below 1", "[1, 0.8]"),
    ),
    "no budget": (
        [{"decompose": {**SVD_LLM, "elastic": []}}],
        "",
        "stages[0].decompose.elastic",
        ("got []", "add at least 1 entry"),
    ),
    "a single budget": (
        [{"decompose": {**SVD_LLM, "elastic": [0.8]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("two or more budgets, got [0.8]",),
    ),
    "an ascending list": (
        [{"decompose": {**SVD_LLM, "elastic": [0.6, 0.8]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("from the largest to the smallest, got [0.6, 0.8]", "write [0.8, 0.6]"),
    ),
    "a budget twice": (
        [{"decompose": {**SVD_LLM, "elastic": [0.8, 0.8, 0.6]}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("different budgets", "write [0.8, 0.6]"),
    ),
    "two kinds of budgets": (
        [{"decompose": {**SVD_LLM, "keep": 0.9}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("exactly one of 'keep', 'size' and 'elastic'", "got keep and elastic"),
    ),
    "a method without ranks": (
        [{"decompose": {"method": "sparse", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("'elastic' cannot be combined with method: sparse", "no order", "svd-llm or kfac"),
    ),
    "a method with biases": (
        [{"decompose": {"method": "lord", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("method: lord", "biases"),
    ),
    "shared factors": (
        [{"decompose": {"method": "basis-sharing", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("method: basis-sharing", "share a factor"),
    ),
    "several component types": (
        [{"decompose": {"method": "mixed", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("method: mixed",),
    ),
    "pivoted factors": (
        [{"decompose": {"method": "kfac", "elastic": BUDGETS}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("storage: pivoted_low_rank", "set storage: low_rank"),
    ),
    "budgets in multiply-adds": (
        [{"decompose": {**SVD_LLM, "measure": "macs"}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("measure: macs", "set measure: bits"),
    ),
    "a plan": (
        [{"decompose": {**SVD_LLM, "plan": "plan.json"}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("plan: plan.json", "remove 'plan'"),
    ),
    "thresholds": (
        [{"decompose": {**SVD_LLM, "allocation": "heavy-tail"}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("allocation: heavy-tail", "set allocation: uniform or lagrangian"),
    ),
    "a floor above the smallest budget": (
        [{"decompose": {**SVD_LLM, "min_keep": 0.65}}],
        "conflicting-keys",
        "stages[0].decompose",
        ("'min_keep' must be at most the smallest of 'elastic', 0.6, got 0.65",),
    ),
    "integers": (
        [{"decompose": SVD_LLM}, {"quantize": {"method": "rtn", "bits": 8}}],
        "contradiction",
        "stages[0].decompose.elastic",
        ("later 'quantize'",),
    ),
    "groups of integers, to which ranks would be rounded": (
        [{"decompose": SVD_LLM}, {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}],
        "contradiction",
        "stages[0].decompose.elastic",
        ("later 'quantize'",),
    ),
    "different budgets of two stages": (
        [
            {"decompose": {**SVD_LLM, "targets": ["*.mlp.*"]}},
            {"decompose": {**SVD_LLM, "targets": ["*.self_attn.*"], "elastic": [0.9, 0.5]}},
        ],
        "contradiction",
        "stages[1].decompose.elastic",
        ("[0.9, 0.8, 0.7, 0.6]", "got [0.9, 0.5]"),
    ),
    "a fit of layers": (
        [{"decompose": SVD_LLM}, {"heal": {"method": "block"}}],
        "contradiction",
        "stages[1].heal.method",
        ("must be distill after a stage with 'elastic', got block",),
    ),
    "a budget that ranks cannot meet": (
        [{"decompose": {**SVD_LLM, "elastic": [0.9, 0.02]}}],
        "infeasible-budget",
        "stages[0].decompose.elastic",
        ("raise the smallest budget",),
    ),
    "a budget that an allocation cannot meet": (
        [{"decompose": {**SVD_LLM, "elastic": [0.9, 0.02], "allocation": "lagrangian"}}],
        "infeasible-budget",
        "stages[0].decompose.elastic",
        ("must be at least", "got 0.02", "raise elastic"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_error(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    case: str,
) -> None:
    stages, code, where, words = BAD[case]
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages)
    lrc("plan", recipe).refuses(2, *words, code=code, where=where)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer version": (lambda b: b["elastic"].update(version=2), "upgrade lrc"),
    "no budgets": (lambda b: b["elastic"].pop("budgets"), "'version' and 'budgets'"),
    "ascending budgets": (lambda b: b["elastic"]["budgets"].reverse(), "descending order"),
    "a budget too many": (lambda b: b["elastic"]["budgets"].append(0.1), "one rank for each"),
    "budgets of another kind": (lambda b: b["elastic"].update(budgets="all"), "budgets must be"),
    "no table": (lambda b: b.pop("elastic"), "one rank for each of the 0 budgets"),
    "a list": (lambda b: b.update(elastic=[0.9, 0.8]), "must be an object"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_table_is_refused(
    run: Run, lrc: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    _, output = run({"decompose": SVD_LLM})
    shutil.copytree(output / "checkpoint", tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged/lrc")
    path = tmp_path / "damaged/config.json"
    config = json.loads(path.read_text())
    change, words = DAMAGE[case]
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    lrc("inspect", tmp_path / "damaged").refuses(1, words)
    lrc("export", tmp_path / "damaged", tmp_path / "out", "--keep", 0.7).refuses(1, words)
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")


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
