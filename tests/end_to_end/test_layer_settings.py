"""Curves of loss by bits, their figure, and the settings of other programs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from gguf import MODEL_ARCH, get_tensor_name_map
from transformers import AutoModelForCausalLM

SCHEMES = ["int8", "int4-g16", "int3-g16", "int4-g16-asymmetric"]


@pytest.fixture(scope="module")
def of_integers(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a recipe whose plan has matrices of different bits, and dense ones."""
    stage = {
        "method": "mixed",
        "keep": 0.3,
        "components": ["dense"],
        "schemes": SCHEMES,
        "ignore": ["*.k_proj"],
    }
    output = tmp_path_factory.mktemp("settings") / "out"
    return tiny_recipe(tiny_model_folder, output, stages=[{"decompose": stage}])


@pytest.fixture
def planned(lrc: Callable[..., Any], of_integers: Path) -> dict[str, Any]:
    ended = lrc("plan", of_integers, "--sensitivity", "--json", "-q")
    assert ended.code == 0, ended.err
    plan: dict[str, Any] = json.loads(ended.out)
    return plan


def schemes(plan: dict[str, Any]) -> dict[str, str]:
    return {
        task["weights"][0]["name"]: task["config"]["components"][0]["quantization"]
        for task in plan["tasks"]
        if task["config"]["components"]
    }


def settings(lrc: Callable[..., Any], recipe: Path, program: str) -> Any:
    ended = lrc("plan", recipe, "--format", program, "-q")
    assert ended.code == 0, ended.err
    return ended


def test_curves_fall_with_the_size_and_contain_the_plan(planned: dict[str, Any]) -> None:
    assert len(planned["curves"]) == 12
    for task in planned["tasks"]:
        name = task["weights"][0]["name"]
        curve = planned["curves"][name]
        assert [p["bits"] for p in curve] == sorted(p["bits"] for p in curve)
        nats = [p["nats"] for p in curve]
        assert nats == sorted(nats, reverse=True)
        assert curve[-1] == {"bits": 16, "nats": 0, "form": "dense"}
        predicted = planned["results"][name]["predicted_nats"]
        assert any(each == pytest.approx(predicted, rel=1e-9) for each in nats)


def test_the_figure_has_a_line_per_matrix(
    lrc: Callable[..., Any], of_integers: Path, tmp_path: Path
) -> None:
    file = tmp_path / "loss.svg"
    ended = lrc("plan", of_integers, "--svg", file, "-q")
    assert ended.code == 0, ended.err
    text = file.read_text()
    assert "12 matrices" in text
    assert "var(--" not in text
    assert "predicted loss increase" in ended.out  # the table, too


def test_compressed_tensors_quantizes_what_the_settings_of_llm_compressor_say(
    lrc: Callable[..., Any], of_integers: Path, planned: dict[str, Any], tiny_model_folder: Path
) -> None:
    recipe = yaml.safe_load(settings(lrc, of_integers, "llm-compressor").out)
    modifier = recipe["quant_stage"]["quant_modifiers"]["GPTQModifier"]
    groups = {k: QuantizationScheme(**v) for k, v in modifier["config_groups"].items()}
    config = QuantizationConfig(config_groups=groups, ignore=modifier["ignore"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    apply_quantization_config(model, config)
    found = {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            args = scheme.weights
            group = f"-g{args.group_size}" if args.strategy == "group" else ""
            found[name] = f"int{args.num_bits}{group}{'' if args.symmetric else '-asymmetric'}"
    assert found == schemes(planned)


def test_settings_of_auto_round_name_every_matrix(
    lrc: Callable[..., Any], of_integers: Path, planned: dict[str, Any]
) -> None:
    config = json.loads(settings(lrc, of_integers, "auto-round").out)
    for name, scheme in schemes(planned).items():
        bits, group = re.fullmatch(r"int(\d)(?:-g(\d+))?(?:-asymmetric)?", scheme).groups()
        assert config[name] == {
            "bits": int(bits),
            "group_size": -1 if group is None else int(group),
            "sym": not scheme.endswith("asymmetric"),
        }


def test_settings_of_llama_cpp_match_one_tensor_each(
    lrc: Callable[..., Any], of_integers: Path, planned: dict[str, Any]
) -> None:
    ended = settings(lrc, of_integers, "llama.cpp")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    linears = [task["weights"][0]["name"] for task in planned["tasks"]]
    tensors = [names.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in linears]
    arguments = ended.out.split()
    assert arguments[::2] == ["--tensor-type"] * len(linears)
    for argument, tensor, name in zip(arguments[1::2], tensors, linears, strict=True):
        pattern, kind = argument.split("=")
        assert [each for each in tensors if re.search(pattern, each)] == [tensor]
        columns = 48 if "down_proj" in name else 32
        scheme = schemes(planned).get(name)
        expected = "F16" if scheme is None or columns % 32 else "IQ4_NL"
        assert kind == (expected if scheme != "int8" or columns % 32 else "Q8_0")
    assert "as types of ggml" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gptq"], "must be llama.cpp, llm-compressor or auto-round"),
        (["--format", "auto-round", "--json"], "leave one out"),
        (["--svg", "loss.png"], "must end in .svg"),
        (["--format", "auto-round", "--all"], "leave one out"),
    ],
)
def test_options_that_contradict_are_refused(
    lrc: Callable[..., Any], of_integers: Path, arguments: list[str], words: str
) -> None:
    lrc("plan", of_integers, *arguments, "-q").refuses(2, words)


def test_low_rank_has_no_settings(
    lrc: Callable[..., Any], of_integers: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(of_integers.read_text())
    recipe["stages"] = [{"decompose": {"method": "kfac", "keep": 0.6}}]
    recipe["output"] = str(tmp_path / "low-rank")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    ended = lrc("plan", file, "--format", "auto-round", "-q")
    ended.refuses(1, "whole matrices of integers only", "components: [dense]")
