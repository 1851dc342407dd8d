"""Mixtures of experts: every matrix of every expert is compressed and stored on its own."""

import json
from collections.abc import Callable
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.tiny_experts import expert_weight, save_experts, tiny_experts
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.compress.group import stored_weight
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import expert_batches
from lrc.compressors.layers.experts import split_modules
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.prepare import prepare
from lrc.compressors.stages import STAGES
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.load import load_recipe

BITS = {"BF16": 16, "F32": 32, "I16": 16, "I32": 32, "I64": 64, "U8": 8}
pytestmark = pytest.mark.usefixtures("one_thread")

SVD = {"decompose": {"method": "svd", "keep": 0.6}}
SVD_LLM = {"decompose": {"method": "svd-llm", "keep": 0.6}}
SHARED = {
    "decompose": {
        "method": "basis-sharing",
        "keep": 0.6,
        "experts_per_group": 3,
        "targets": ["*.experts.*"],
    }
}
KFAC = {"decompose": {"method": "kfac", "keep": 0.6, "compensate": {}}}
MIXED = {"decompose": {"method": "mixed", "keep": 0.4, "schemes": ["int4", "int8"]}}
INT4 = {"quantize": {"method": "gptq", "bits": 4}}
INT8 = {"quantize": {"method": "rtn", "bits": 8}}
RUNS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mixtral svd-llm": ("mixtral", [SVD_LLM]),
    "qwen3_moe kfac": ("qwen3_moe", [KFAC]),
    "qwen3_moe mixed": ("qwen3_moe", [MIXED]),
    "gpt_oss gptq": ("gpt_oss", [INT4]),
    "gpt_oss svd-llm, int8": ("gpt_oss", [SVD_LLM, INT8]),
    "deepseek_v3 mixed": ("deepseek_v3", [MIXED]),
    "granitemoe svd": ("granitemoe", [SVD]),
    "llama4_text kfac": ("llama4_text", [KFAC]),
    "nemotron_h svd-llm": ("nemotron_h", [SVD_LLM]),
    "qwen3_moe basis-sharing": ("qwen3_moe", [SHARED]),
    "gpt_oss basis-sharing, int8": ("gpt_oss", [SHARED, INT8]),
}


@pytest.fixture(scope="module")
def folders(make_tokenizer: Callable[..., Any], tmp_path_factory: Any) -> Callable[..., Path]:
    """Save the tiny model of a family, once."""
    found: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in found:
            path = tmp_path_factory.mktemp("models") / family
            found[family] = save_experts(tiny_experts(family), make_tokenizer(), path)
        return found[family]

    return folder


@pytest.fixture(scope="module")
def runs(
    folders: Callable[..., Path], tiny_recipe: Callable[..., Path], tmp_path_factory: Any
) -> Callable[..., Path]:
    """Carry out one of `RUNS`, once, and return its output folder."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            family, stages = RUNS[name]
            output = tmp_path_factory.mktemp("runs") / "run"
            recipe = tiny_recipe(
                folders(family),
                output,
                model={"path": str(folders(family)), "dtype": "float32"},
                calibration={"source": "python-docs", "samples": 8, "length": 64},
                stages=stages,
                evaluate={"perplexity": []},
            )
            compress(load_recipe(recipe), Machine("cpu"))
            done[name] = output
        return done[name]

    return run


@pytest.fixture
def sample() -> Tensor:
    return torch.randint(2, 512, (2, 30), generator=torch.Generator().manual_seed(1))


def plan_of(output: Path) -> Plan:
    return Plan.from_json(json.loads((output / "checkpoint/lrc/plan.json").read_text()))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def load(folder: Path) -> Any:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def dense_with_stored_weights(source: Path, output: Path) -> Any:
    """Return the model of transformers, with fused experts, with the weights of a checkpoint."""
    model, plan = load(source), plan_of(output)
    tensors = load_file(output / "checkpoint/model.safetensors")
    for task in plan.tasks:
        result = plan.results[task.name]
        for weight in task.weights if result.config.compressed or result.refit else []:
            W_hat = stored_weight(task, result, weight.name, tensors.__getitem__)
            expert_weight(model, weight.name).copy_(W_hat)
    return model


@pytest.mark.oldest
@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_model_equals_the_dense_one_with_its_weights(name, runs, folders, sample):
    source, output = folders(RUNS[name][0]), runs(name)
    found = load(output / "checkpoint")
    expected = logits(dense_with_stored_weights(source, output), sample)
    scale = float(expected.std())
    torch.testing.assert_close(logits(found, sample), expected, rtol=0, atol=1e-4 * scale)
    assert (logits(load(source), sample) - expected).abs().max() > 1e-3 * scale
    written = found.generate(sample, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (2, 33)


@pytest.mark.parametrize("name", RUNS)
def test_bytes_of_every_expert_are_those_of_the_plan(name, runs):
    output = runs(name)
    sizes: dict[str, int] = {}
    with safe_open(output / "checkpoint/model.safetensors", framework="pt") as file:
        for key in file.keys():
            part = file.get_slice(key)
            sizes[key] = prod(part.get_shape()) * BITS[part.get_dtype()]
    plan, n_experts = plan_of(output), 0
    for task in plan.tasks:
        config = plan.stored_config(task)
        members = tuple(f"{weight.name}." for weight in task.weights)
        found = sum(
            bits
            for key, bits in sizes.items()
            if key.startswith(members) and not key.endswith(".bias")
        )
        assert found == task.bits_of(config), task.name
        n_experts += sum(".experts." in name for name in members)
    assert plan.experts is not None
    assert n_experts == 2 * plan.experts.layers * plan.experts.experts
    assert sum(sizes.values()) == 8 * plan.compressed_bytes


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text"])
def test_experts_compensate_unless_the_selection_of_the_router_cannot_be_kept(family, runs):
    plan = plan_of(runs(f"{family} kfac"))
    of_experts = [plan.results[t.name] for t in plan.tasks if ".experts." in t.name]
    assert {result.refit for result in of_experts} == {family == "qwen3_moe"}
    others = [plan.results[t.name] for t in plan.tasks if ".experts." not in t.name]
    assert all(result.refit for result in others)


def test_integers_of_experts_are_said_to_need_lrc(runs):
    warnings = json.loads((runs("gpt_oss gptq") / "report.json").read_text())["warnings"]
    assert any("GptOssForCausalLM" in text and "`import lrc`" in text for text in warnings)


def test_experts_of_integers_are_refused_for_engines(folders, tiny_recipe, tmp_path):
    stages = [{"quantize": {"method": "rtn", "bits": 8}}]
    recipe = tiny_recipe(folders("qwen3_moe"), tmp_path / "run", stages=stages)
    plan = prepare(load_recipe(recipe).recipe, STAGES).plan
    assert not any("kernel" in text for text in plan.warnings)
    with pytest.raises(RecipeError, match="got compressed experts of model"):
        prepare(load_recipe(recipe, ["serve=vllm"]).recipe, STAGES)


def test_routers_stay_as_they_are(runs, folders):
    for name in ("mixtral svd-llm", "gpt_oss gptq", "deepseek_v3 mixed", "llama4_text kfac"):
        dense, found = load(folders(RUNS[name][0])), load(runs(name) / "checkpoint")
        routers = [n for n, _ in dense.named_parameters() if ".gate." in n or ".router." in n]
        assert routers
        state = found.state_dict()
        assert all(torch.equal(state[n], dense.get_parameter(n)) for n in routers)


SCRIPT = """
import json, sys
import lrc, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folders, expected = json.loads(sys.argv[1]), load_file(sys.argv[2])
found = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        y = model(input_ids=expected["sample"], use_cache=False).logits
    found[name] = float((y - expected[name]).abs().max())
print(json.dumps(found))
"""


def test_a_fresh_process_gives_the_same_logits(runs, sample, tmp_path, with_lrc):
    names = ("mixtral svd-llm", "qwen3_moe mixed", "gpt_oss gptq", "deepseek_v3 mixed")
    folders = {name: str(runs(name) / "checkpoint") for name in names}
    tensors = {name: logits(load(Path(folder)), sample) for name, folder in folders.items()}
    save_file({"sample": sample, **tensors}, tmp_path / "logits.safetensors")
    done = with_lrc(SCRIPT, json.dumps(folders), tmp_path / "logits.safetensors")
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout).values()) <= 1e-5


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["mixtral svd-llm", "qwen3_moe mixed", "gpt_oss gptq"])
def test_a_model_can_be_saved_again_and_dequantized(name, runs, sample, tmp_path):
    model = load(runs(name) / "checkpoint")
    expected = logits(model, sample)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), sample), expected)
    dense = deepcopy(model).dequantize()
    assert not any(".experts.0." in key for key in dense.state_dict())
    dense.save_pretrained(tmp_path / "dense")
    found = logits(load(tmp_path / "dense"), sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("name", ["mixtral svd-llm", "nemotron_h svd-llm"])
def test_experts_that_are_multiplied_together_change_nothing(
    name, runs, sample, tmp_path, monkeypatch
):
    loop = load(runs(name) / "checkpoint")
    expected = logits(loop, sample)
    monkeypatch.setattr(expert_batches, "DEVICES", ("cpu",))
    model = load(runs(name) / "checkpoint")
    called = []
    for _, module in split_modules(model):
        apply = module.batches._batches[0].apply
        monkeypatch.setattr(
            module.batches._batches[0],
            "apply",
            lambda *a, apply=apply: called.append(1) or apply(*a),
        )
    atol = 1e-4 * float(expected.std())
    torch.testing.assert_close(logits(model, sample), expected, rtol=0, atol=atol)
    assert called
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(sample, **options), loop.generate(sample, **options))
    model.save_pretrained(tmp_path)
    saved, source = (
        load_file(folder / "model.safetensors") for folder in (tmp_path, runs(name) / "checkpoint")
    )
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in source.items())


def test_experts_that_are_not_compressed_stay_fused(folders, tiny_recipe, sample, tmp_path):
    source = folders("qwen3_moe")
    recipe = tiny_recipe(
        source,
        tmp_path / "run",
        model={"path": str(source), "dtype": "float32"},
        stages=[{"decompose": {"method": "svd", "keep": 0.6, "ignore": ["*.experts.*"]}}],
        evaluate={"perplexity": []},
    )
    compress(load_recipe(recipe), Machine("cpu"))
    tensors, dense = load_file(tmp_path / "run/checkpoint/model.safetensors"), load(source)
    fused = [name for name, _ in dense.named_parameters() if ".experts." in name]
    assert fused
    assert all(torch.equal(tensors[name], dense.get_parameter(name)) for name in fused)
    found = logits(load(tmp_path / "run/checkpoint"), sample)
    expected = logits(dense_with_stored_weights(source, tmp_path / "run"), sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_keep_1_leaves_experts_and_logits_unchanged(folders, tiny_recipe, sample, tmp_path):
    """Everything but one matrix keeps all of its bits; that matrix keeps the same values."""
    model = tiny_experts("mixtral")
    low = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():  # of rank 4, so that half of the bits lose nothing
        U, S, V = torch.linalg.svd(low.weight)
        low.weight.copy_((U[:, :4] * S[:4]) @ V[:4])
    source = folders("mixtral").with_name("low-rank")
    model.save_pretrained(source)
    for file in folders("mixtral").glob("token*"):
        (source / file.name).write_bytes(file.read_bytes())
    recipe = tiny_recipe(
        source,
        tmp_path / "run",
        model={"path": str(source), "dtype": "float32"},
        stages=[
            {
                "decompose": {
                    "method": "svd-llm",
                    "targets": ["*.experts.*", "*.layers.0.self_attn.q_proj"],
                    "keep": 0.99,
                    "allocation": "uniform",
                    "overrides": [
                        {"match": "*.experts.*", "keep": 1.0},
                        {"match": "*.q_proj", "keep": 0.5},
                    ],
                }
            }
        ],
        evaluate={"perplexity": []},
    )
    compress(load_recipe(recipe), Machine("cpu"))
    plan = plan_of(tmp_path / "run")
    assert {*plan.modules()} == {"model.layers.0.self_attn.q_proj"}
    assert all("keep is 1" in str(t.note) for t in plan.tasks if ".experts." in t.name)
    expected = logits(load(source), sample)
    found = logits(load(tmp_path / "run/checkpoint"), sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.fixture
def biased(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Save a model whose routers never select some of the experts."""

    def save(*unused: int, **changes: int) -> Path:
        model = tiny_experts("gpt_oss", **changes)
        for layer in model.model.layers:
            with torch.no_grad():
                layer.mlp.router.bias[[*unused]] = -1e4
        return save_experts(model, make_tokenizer(), tmp_path / "biased")

    return save


@pytest.mark.parametrize("stage", [SVD_LLM, KFAC, MIXED, INT4], ids=str)
def test_an_unused_expert_has_a_fallback_that_is_reported(stage, biased, tiny_recipe, tmp_path):
    recipe = tiny_recipe(biased(3), tmp_path / "run", stages=[stage], evaluate={"perplexity": []})
    report = compress(load_recipe(recipe), Machine("cpu"))
    rounds = stage in (MIXED, INT4)
    unused = [layer for layer in report["layers"] if ".experts.3." in layer["name"]]
    assert len(unused) == 4
    for layer in unused:
        assert bool(layer["config"]["components"]) == rounds
        why = layer["fallback"] or layer["note"]
        assert why.startswith("saw no calibration token")
    used = [layer for layer in report["layers"] if ".experts.1." in layer["name"]]
    assert not any(layer["fallback"] for layer in used)
    coverage = report["experts"]["coverage"]
    assert coverage["experts"] == 8
    assert (coverage["tokens_min"], coverage["starved"]) == (0, 2)
    assert coverage["tokens_median"] > coverage["needed"]


def test_experts_of_one_layer_share_a_factor_and_all_other_matrices_those_of_two(
    folders, tiny_recipe, tmp_path
):
    stage = {**SHARED["decompose"], "targets": ["*"], "ignore": ["*.experts.1.down_proj"]}
    recipe = tiny_recipe(folders("qwen3_moe"), tmp_path / "run", stages=[{"decompose": stage}])
    plan = prepare(load_recipe(recipe).recipe, STAGES).plan
    groups = [[w.name.removeprefix("model.layers.") for w in task.weights] for task in plan.tasks]
    assert [f"1.mlp.experts.{n}.gate_up_proj" for n in (0, 1, 2)] in groups
    assert [f"1.mlp.experts.{n}.gate_up_proj" for n in (3, 4, 5)] in groups
    assert ["0.mlp.experts.0.down_proj"] in groups
    assert [f"0.mlp.experts.{n}.down_proj" for n in (2, 3, 4)] in groups
    assert ["0.self_attn.q_proj", "1.self_attn.q_proj"] in groups
    many = "stages.0.decompose.experts_per_group=7"
    with pytest.raises(RecipeError, match="must be at most 6, the number of experts of a layer"):
        prepare(load_recipe(recipe, [many]).recipe, STAGES)


def test_an_unused_expert_shares_the_factor_of_the_others(biased, tiny_recipe, tmp_path):
    recipe = tiny_recipe(biased(3), tmp_path / "run", stages=[SHARED], evaluate={"perplexity": []})
    report = compress(load_recipe(recipe), Machine("cpu"))
    coverage = report["experts"]["coverage"]
    assert (coverage["experts"], coverage["tokens_min"], coverage["starved"]) == (8, 0, 2)
    plan = plan_of(tmp_path / "run")
    shared = [task for task in plan.tasks if ".experts.0." in task.name]
    assert [len(task.weights) for task in shared] == [3] * 4
    alone = [task for task in plan.tasks if ".experts.3." in task.name]
    for task in alone:  # the last group
        fallback = plan.results[task.name].fallback
        assert fallback is not None
        assert fallback.startswith("saw no calibration token")
    recipe = tiny_recipe(
        biased(2), tmp_path / "other", stages=[SHARED], evaluate={"perplexity": []}
    )
    compress(load_recipe(recipe), Machine("cpu"))
    plan = plan_of(tmp_path / "other")
    for task in (task for task in plan.tasks if ".experts.0." in task.name):
        result = plan.results[task.name]
        assert result.config.compressed
        assert result.fallback is None
        assert isinstance(result.n_tokens, tuple)
        assert [count > 0 for count in result.n_tokens] == [True, True, False]


def test_a_run_is_refused_if_most_experts_starve(biased, tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        biased(*range(2, 8), num_local_experts=8), tmp_path / "run", evaluate={"perplexity": []}
    )
    with pytest.raises(DataError, match=r"12 of 16 experts received fewer") as error:
        compress(load_recipe(recipe), Machine("cpu"))
    assert error.value.code == "starved-experts"


def test_a_text_that_is_too_short_for_the_experts_is_refused_by_the_plan(
    folders, tiny_recipe, tmp_path
):
    recipe = tiny_recipe(
        folders("deepseek_v3"),
        tmp_path / "run",
        calibration={"source": "python-docs", "samples": 2, "length": 8},
    )
    with pytest.raises(RecipeError, match="must have 32 tokens or more, got 16") as error:
        compress(load_recipe(recipe), Machine("cpu"))
    assert error.value.problems[0].code == "starved-experts"
