"""`lrc delta make` and `apply` on tiny models: sizes, errors and ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_deltas import MATRIX, METHODS, load, logits_of, weights

import lrc as package

# PEFT asks for an attribute that the newest transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("method", METHODS)
def test_the_applied_model_has_the_reported_sizes_and_errors(
    method: str,
    make: Callable[..., dict[str, Any]],
    lrc: Callable[..., Any],
    models: Path,
    tmp_path: Path,
) -> None:
    facts = make("tuned", tmp_path / "delta", method, *METHODS[method])
    stored = load_file(tmp_path / "delta/delta.safetensors")
    table = stored.pop("table")
    assert 8 * sum(t.nbytes for t in stored.values()) == facts["sizes"]["bits"]
    assert table.numel() < 4000
    files = [file for file in (tmp_path / "delta").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == facts["file_bytes"]

    assert lrc("delta", "apply", models / "base", tmp_path / "delta", tmp_path / "out").code == 0
    base, tuned, found = map(weights, (models / "base", models / "tuned", tmp_path / "out"))
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert "model.embed_tokens.weight" not in [each["name"] for each in facts["tensors"]]
    for each in facts["tensors"]:
        name = each["name"]
        error = (found[name] - tuned[name]).norm() / (tuned[name] - base[name]).norm()
        assert each["relative_error"] == pytest.approx(float(error), rel=1e-3, abs=1e-6)
    numbers = sum(tuned[each["name"]].numel() for each in facts["tensors"])
    assert facts["sizes"]["numbers"] == numbers
    assert facts["sizes"]["ratio"] == pytest.approx(16 * numbers / facts["sizes"]["bits"])
    assert 0 < facts["sizes"]["relative_error"] < 1
    assert load(tmp_path / "out").generation_config.max_new_tokens == 7
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == (models / "tuned" / name).read_text()

    model = load(models / "base")
    package.load_delta(model, tmp_path / "delta")
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "out")))


def test_a_sparse_delta_of_everything_is_exact_and_is_made_again(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "all", "sparse", "density=1.0")
    assert facts["sizes"]["relative_error"] == 0
    lrc("delta", "apply", models / "base", tmp_path / "all", tmp_path / "out")
    found, tuned = weights(tmp_path / "out"), weights(models / "tuned")
    assert all(torch.equal(found[name], tuned[name]) for name in tuned)

    make("tuned", tmp_path / "some", "sparse", "density=0.1")
    lrc("delta", "apply", models / "base", tmp_path / "some", tmp_path / "part")
    again = make(tmp_path / "part", tmp_path / "again", "sparse", "density=0.1")
    assert again["sizes"]["relative_error"] == 0
    files = [tmp_path / name / "delta.safetensors" for name in ("some", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_delta_of_full_rank_is_exact_within_rounding(
    make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "delta", "low-rank", "rank=16")
    found = {each["name"].split(".")[-2]: each for each in facts["tensors"]}
    assert found["k_proj"]["codec"] == found["q_proj"]["codec"] == "low_rank"
    assert found["k_proj"]["relative_error"] < 0.01 < 0.1 < found["q_proj"]["relative_error"]


def test_ranks_fit_a_size_and_are_chosen_by_error(
    make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    for tuned in ("tuned", "adapter"):
        uniform = make(tuned, tmp_path / f"{tuned}-rank", "low-rank", "rank=3")["sizes"]
        size = f"{uniform['bits'] // 8}B"
        chosen = make(tuned, tmp_path / f"{tuned}-size", "low-rank", f"size={size}")["sizes"]
        assert 0.95 * uniform["bits"] < chosen["bits"] <= uniform["bits"]
        assert chosen["relative_error"] < uniform["relative_error"]


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_calibrated_ranks_lose_less_of_what_the_text_uses(
    tuned: str, make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words that the model has to read, and then some more of them. " * 40)
    calibration = [f"calibration.source={text}", "calibration.samples=4", "calibration.length=32"]
    plain = make(tuned, tmp_path / "plain", "low-rank", "rank=2")
    size = f"size={plain['sizes']['bits'] // 8}B"
    uniform, chosen = (
        make(tuned, tmp_path / rank, "low-rank", rank, *calibration) for rank in ("rank=2", size)
    )
    assert uniform["sizes"]["bits"] == plain["sizes"]["bits"] >= chosen["sizes"]["bits"]
    assert uniform["sizes"]["relative_error"] > plain["sizes"]["relative_error"]
    assert chosen["sizes"]["weighted_error"] < uniform["sizes"]["weighted_error"] < 1
    weighted = [each["name"] for each in uniform["tensors"] if "weighted_error" in each]
    assert any("down_proj" in name for name in weighted)
    assert not any("norm" in name or "lm_head" in name for name in weighted)
    assert not list(tmp_path.rglob("calibration-*"))
    assert uniform["method"]["calibration"]["length"] == 32


def test_what_is_not_smaller_as_factors_is_stored_as_it_is(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "delta", "low-rank", "keep=1", "dtype=float32")
    (matrix,) = (each for each in facts["tensors"] if each["name"] == MATRIX)
    assert (matrix["codec"], matrix["relative_error"]) == ("exact", 0)


def test_the_table_has_one_row_for_layers_that_are_alike(
    lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    arguments = ("delta", "make", models / "base", models / "tuned")
    short = lrc(*arguments, tmp_path / "a", "-q").out
    assert "model.layers.*.self_attn.q_proj.weight" in short
    assert "times smaller than in 16 bits" in short
    every = lrc(*arguments, tmp_path / "b", "--all", "-q").out
    assert MATRIX in every


def test_inspect_shows_what_make_has_reported(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "delta", "sparse", "density=0.1")
    ended = lrc("inspect", tmp_path / "delta", "--json")
    assert (ended.code, ended.err) == (0, "")
    shown = json.loads(ended.out)
    for each in facts["tensors"]:
        del each["relative_error"]  # of which the folder has only the total
    for key in ("kind", "method", "sizes", "tensors", "file_bytes"):
        assert shown[key] == facts[key]
    assert "model.layers.*.self_attn.q_proj.weight" in lrc("inspect", tmp_path / "delta").out
    weights_file = tmp_path / "delta/delta.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    lrc("inspect", tmp_path / "delta").refuses(1, "has changed", code="changed-file")
    description = tmp_path / "delta/delta.json"
    description.write_text(description.read_text().replace('"numbers"', '"number"'))
    lrc("inspect", tmp_path / "delta").refuses(1, "keys are missing", code="invalid-delta")
