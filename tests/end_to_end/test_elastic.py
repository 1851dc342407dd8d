"""Elastic checkpoints: one file, several budgets, each equal to factors that are cut by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe

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
Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Two would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path_factory: Any) -> Run:
    """Run stages on the tiny model; return the report and the output folder. Runs are shared."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def start(*stages: dict[str, Any]) -> Any:
        key = json.dumps(stages)
        if key not in done:
            output = tmp_path_factory.mktemp("elastic") / "run"
            recipe = tiny_recipe(tiny_model_folder, output, stages=[*stages])
            done[key] = compress(load_recipe(recipe), Machine("cpu")), output
        return done[key]

    return start


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
    ended = lrc("export", output / "checkpoint", out, "--keep", 0.7)
    assert ended.code == 0, ended.err
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
    again = lrc("export", out, tmp_path / "again", "--keep", 0.6)
    again.refuses(1, "not elastic", "compress with 'elastic'", code="not-elastic", where=str(out))


def test_inspection_lists_the_budgets(run: Run, lrc: Callable[..., Any]) -> None:
    _, output = run({"decompose": SVD_LLM})
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
    lrc("export", tmp_path / "none", out, "--keep", 0.7).refuses(1, "no such folder")
    lrc("export", checkpoint, tmp_path, "--keep", 0.7).refuses(1, "exists already")
    inside = checkpoint / "inside"
    lrc("export", checkpoint, inside, "--keep", 0.7).refuses(1, "must not be inside")
    assert not out.exists()
