"""What users do with a checkpoint of integers, with lrc and without."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fresh_processes import FreshProcesses
from tests.shared_runs import DISK
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.cli.inspect import describe
from lrc.compressors.checkpoint.reader import load_checkpoint
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import CompressedLinear, WeightConfig
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError, Stopped
from lrc.configs.load import load_recipe

INT4 = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}
INT4_G8 = {"quantize": {**INT4["quantize"], "group_size": 8}}
OURS: dict[str, list[dict[str, Any]]] = {
    "asymmetric": [{"quantize": {"method": "gptq", "bits": 3, "symmetric": False}}],
    "correction": [{"quantize": {**INT4["quantize"], "low_rank_correction": {"rank": 4}}}],
    "factors": [{"decompose": {"method": "svd-llm", "keep": 0.8}}, INT4_G8],
    "shared": [{"decompose": {"method": "basis-sharing", "keep": 0.8}}, INT4_G8],
    "joint": [{"decompose": {"method": "mixed", "keep": 0.2, "schemes": ["int8", "int3-g16"]}}],
}
PLAIN: dict[str, list[dict[str, Any]]] = {
    "int8": [{"quantize": {"method": "rtn"}}],
    "int4": [{"quantize": {**INT4["quantize"], "compensate": {}}}],
    "some": [{"quantize": {"method": "rtn", "bits": 3, "targets": ["*.mlp.*"]}}],
    "schemes": [
        {
            "decompose": {
                "method": "mixed",
                "keep": 0.35,
                "components": ["dense"],
                "schemes": ["int8", "int3"],
            }
        }
    ],
}


@pytest.fixture(scope="module")
def runs(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Run a recipe once, and return its checkpoint."""
    base = tmp_path_factory.mktemp("integers")

    def run(name: str) -> Path:
        if not (base / name).exists():
            stages = (OURS | PLAIN)[name]
            path = tiny_recipe(tiny_model_folder, base / name, stages=stages)
            compress(load_recipe(path), Machine("cpu"))
        return base / name / "checkpoint"

    return run


def load(folder: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
        return logits.float()


@pytest.mark.parametrize("name", OURS)
def test_saving_again_gives_the_same_tensors(runs, name: str, tmp_path: Path) -> None:
    load(runs(name), dtype="auto").save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (runs(name), tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(before[key].dtype == after[key].dtype for key in before)
    blocks = [
        json.loads((f / "config.json").read_text())["quantization_config"]["modules"]
        for f in (runs(name), tmp_path)
    ]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("name", OURS)
def test_a_dequantized_model_computes_the_same(runs, name: str, sample, tmp_path) -> None:
    model = load(runs(name))
    expected = logits_of(model, sample)
    model.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    torch.testing.assert_close(logits_of(model, sample), expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load(tmp_path), sample), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, DISK], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_every_device_map_gives_the_same_logits(
    runs, name: str, device_map: Any, sample, tmp_path
) -> None:
    model = load(runs(name), device_map=device_map, offload_folder=tmp_path / "offload")
    expected = logits_of(load(runs(name)), sample)
    # Weights on disk have no fast path and share no product: results differ by rounding, at most
    # 3e-6 as measured, of logits up to 5.
    close = 5e-5 if device_map is DISK else 0
    torch.testing.assert_close(logits_of(model, sample), expected, rtol=0, atol=close)


@pytest.mark.parametrize("name", [*OURS, "int4"])
def test_the_cache_changes_no_token(runs, name: str, sample) -> None:
    model = load_checkpoint(runs(name), dtype=torch.float32)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(sample[:, :8], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


# PEFT asks for an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_find_the_factors_of_the_correction(runs, sample) -> None:
    model = load(runs("correction"))
    before = logits_of(model, sample)
    config = peft.LoraConfig(
        r=2, target_modules=r".*\.up_proj\.low_rank\.[ab]", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits_of(adapted, sample), before)
    adapted(sample, labels=sample).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)


WITHOUT_LRC = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model, found = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(found.values()), found
tensors = load_file(sys.argv[2])
with torch.no_grad():
    print(float((model(tensors["sample"]).logits - tensors["logits"]).abs().max()))
"""


@pytest.mark.parametrize("name", ["int4", "some", "schemes"])
def test_plain_checkpoints_need_no_lrc(
    runs, name: str, sample, tmp_path: Path, without_lrc: FreshProcesses
) -> None:
    logits = logits_of(load_checkpoint(runs(name), dtype=torch.float32), sample)
    save_file({"sample": sample, "logits": logits}, tmp_path / "logits.safetensors")
    ended = without_lrc(WITHOUT_LRC, runs(name), tmp_path / "logits.safetensors")
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) <= 1e-4


@pytest.mark.parametrize("name", ["asymmetric", "factors"])
def test_other_checkpoints_stop_without_lrc(
    runs, name: str, tmp_path: Path, without_lrc: FreshProcesses
) -> None:
    ended = without_lrc(WITHOUT_LRC, runs(name), tmp_path)
    assert ended.returncode != 0
    assert "lrc" in ended.stderr


@pytest.mark.parametrize("name", [*OURS, *PLAIN])
def test_inspect_shows_and_verifies_every_weight(
    runs, name: str, executed, lrc, tmp_path: Path
) -> None:
    folder = runs(name)
    ended = lrc("inspect", folder, "--verify")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads((folder / "lrc/report.json").read_text())
    facts = describe(folder, verify=True)
    shown = {m["name"]: WeightConfig.from_json(config_of(m)) for m in facts["modules"]}
    assert shown == executed(folder.parent).modules()
    assert facts["parameters"] == report["size"]["model"]["parameters"]["compressed"]
    copy = shutil.copytree(folder, tmp_path / "spoiled")
    tensors = load_file(folder / "model.safetensors")
    leaf = next(key for key in tensors if key.endswith("_packed"))
    for spoiled in (None, tensors[leaf][:, :-1].contiguous(), tensors[leaf].long()):
        content = {**tensors, leaf: spoiled}
        content = {key: t for key, t in content.items() if t is not None}
        save_file(content, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{leaf}: expected") as refused:
            describe(copy, verify=False)
        assert refused.value.code == "tensor-mismatch"


def config_of(module: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in what `describe` returns of a weight."""
    return {key: module[key] for key in ("shape", "components", "bias") if key in module}


def test_a_plain_checkpoint_is_evaluated_without_messages_of_other_libraries(
    runs, tiny_text, lrc
) -> None:
    folder = runs("int4")
    ended = lrc("eval", folder, "--perplexity", tiny_text, "--window", 32, "--windows", 2)
    assert ended.code == 0, ended.err
    assert all("perplexity english" in line for line in ended.err.splitlines()), ended.err


@pytest.mark.parametrize("name", ["int4", "factors", "joint"])
def test_a_stopped_run_and_a_second_one_give_the_same_bytes(
    runs, name: str, tiny_model_folder, tiny_recipe, tmp_path: Path
) -> None:
    stages = (OURS | PLAIN)[name]
    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("compress", 1):
            raise Stopped("requested")

    with pytest.raises(Stopped):
        compress(recipe, Machine("cpu", on_step=stop))
    compress(recipe, Machine("cpu"))
    weights = [f / "model.safetensors" for f in (runs(name), tmp_path / "run/checkpoint")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
