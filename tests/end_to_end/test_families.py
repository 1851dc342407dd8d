"""Every supported family, from a source on disk to a checkpoint that stock transformers loads."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.shared_runs import made_once
from torch import Tensor, nn

from lrc.compressors.calibrate.statistic_table import is_symmetric
from lrc.compressors.calibrate.statistics import COLUMN
from lrc.compressors.calibrate.symmetric_storage import unpack_symmetric
from lrc.compressors.planning.summary import summarize

BITS = {"BF16": 16, "F16": 16, "F32": 32, "I16": 16, "U8": 8}


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def stored_bits(folder: Path) -> dict[str, int]:
    """Read name -> bits from the headers of all shards."""
    bits = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                part = shard.get_slice(name)
                bits[name] = prod(part.get_shape()) * BITS[part.get_dtype()]
    return bits


def moments_of(run: Any, kind: str) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """Yield the name of every linear, the tensors of its file, and the names of their owners."""
    for file in sorted((run.work / "statistics").glob(f"{kind}-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            facts = {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
        if kind == "inputs":
            assert facts["n_tokens"] == run.tokens.numel()
        tensors = load_file(file)
        columns = {key: tensors.pop(key) for key in [*tensors] if key.endswith(COLUMN)}
        for key in tensors:
            if is_symmetric(key.rpartition(".")[2]):
                column = columns.get(f"{key}{COLUMN}", tensors[key][:0])
                tensors[key] = unpack_symmetric(tensors[key], column)
        owners = facts.get("leaders") or {key.rpartition(".")[0]: "" for key in tensors}
        for name, leader in owners.items():
            yield name, tensors, {"own": name, "shared": leader or name}


def assert_close(streamed: Tensor, v: Tensor, tolerance: float) -> None:
    """Compare with the second moment of ``v`` [n_tokens, d]."""
    moment = v.T @ v
    scale = moment.diagonal().mean()
    torch.testing.assert_close(
        streamed.double() / scale, moment / scale, rtol=tolerance, atol=tolerance
    )


def test_streamed_moments_are_those_of_the_whole_model(run):
    """Of inputs and, if the method requires them, of output gradients; whole or as an image."""
    model = run.dense()
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            inputs[name] = args[0].detach().flatten(0, -2).double()
            y.register_hook(lambda g: gradients.__setitem__(name, g.flatten(0, -2).double()))

        return hook

    targets = [weight.name for weight in summarize(run.plan())]
    for name in targets:
        module = model.get_submodule(name)
        weights[name] = module.weight.detach().double()
        module.register_forward_hook(watch(name))
    logits = model(run.tokens).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), run.tokens[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()

    compared = {"inputs": 0, "gradients": 0}
    for name, tensors, keys in moments_of(run, "inputs"):
        if f"{keys['shared']}.inputs" in tensors:
            assert_close(tensors[f"{keys['shared']}.inputs"], inputs[name], 3e-5)
        else:
            assert_close(tensors[f"{name}.image"], inputs[name] @ weights[name].T, 3e-5)
        compared["inputs"] += 1
    # Checkpoints of 16-bit models are bfloat16: at most 0.016 measured, in OPT.
    tolerance = 3e-5 if run.family.dtype == "float32" else 5e-2
    for name, tensors, _ in moments_of(run, "gradients"):
        if f"{name}.gradients" in tensors:
            assert_close(tensors[f"{name}.gradients"], gradients[name], tolerance)
        else:
            assert_close(tensors[f"{name}.image"], gradients[name] @ weights[name], tolerance)
        compared["gradients"] += 1
    with_gradients = run.family.stage["method"] == "kfac"
    assert compared == {"inputs": len(targets), "gradients": len(targets) if with_gradients else 0}


def test_linears_of_one_input_share_one_moment(run):
    """Query, key and value; gate and up. No others: a parallel residual has two norms."""
    for file in sorted((run.work / "statistics").glob("inputs-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            leaders = json.loads(opened.metadata()["leaders"])
        groups: dict[str, set[str]] = {}
        for name, leader in leaders.items():
            groups.setdefault(leader, set()).add(name.rpartition(".")[2])
        shared = [group for group in groups.values() if len(group) > 1]
        expected = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
        present = {name.rpartition(".")[2] for name in leaders}
        assert shared == [group for group in expected if group <= present]


def test_every_step_of_the_recommended_method_has_an_effect(run):
    weights = summarize(run.plan())
    if run.family.stage["method"] != "kfac":
        assert {w.config.types for w in weights} <= {"low_rank", "dense"}
        return
    assert {w.config.types for w in weights if w.rank} == {"pivoted_low_rank"}
    assert len({round(w.bits / w.dense_bits, 2) for w in weights}) > 2  # unequal fractions
    assert all(w.result.refit and w.result.fallback is None for w in weights)
    assert all((w.result.predicted_nats or 0) > 0 for w in weights if w.rank)


def test_loaded_logits_equal_those_of_the_model_in_memory(run, sample):
    loaded = run.load()
    with torch.no_grad():
        a, b = loaded(sample).logits, run.in_memory()(sample).logits
        dense = run.dense()(sample).logits
    assert largest_difference(a, b) <= 1e-5  # 0 is usual
    assert torch.equal(a.argmax(-1), b.argmax(-1))
    assert largest_difference(a, dense) > 1e-2  # something was compressed


def test_generates(run, sample):
    out = run.load().generate(sample, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 44)


def test_bits_on_disk_are_those_of_the_plan(run):
    plan = run.plan()
    stored = stored_bits(run.checkpoint)
    for weight in summarize(plan):
        tensors = {k: v for k, v in stored.items() if k.startswith(f"{weight.name}.")}
        found = sum(bits for name, bits in tensors.items() if not name.endswith("bias"))
        assert found == weight.bits, weight.name
    assert plan.kept <= 0.6
    assert run.report["size"]["targeted"]["bits"] == plan.bits
    assert sum(stored.values()) == 8 * plan.compressed_bytes
    whole = sum(file.stat().st_size for file in run.checkpoint.glob("*.safetensors"))
    assert run.report["size"]["model"]["file_bytes"]["compressed"] == whole


def test_parameters_of_the_report_are_those_of_the_models(run):
    parameters = run.report["size"]["model"]["parameters"]
    assert parameters["dense"] == sum(p.numel() for p in run.dense().parameters())
    assert parameters["compressed"] == sum(p.numel() for p in run.load().parameters())


def test_stored_precision_is_the_recipes(run):
    dtype = getattr(torch, run.family.dtype)
    assert {p.dtype for p in run.load(dtype="auto").parameters()} == {dtype}


@pytest.mark.parametrize("name", ["qwen3-sharded"])
def test_small_shards_are_split_and_indexed(families, name):
    run = families(name)
    shards = sorted(file.name for file in run.checkpoint.glob("*.safetensors"))
    index = json.loads((run.checkpoint / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert set(index["weight_map"]) == set(stored_bits(run.checkpoint))
    assert len(list(run.source.glob("*.safetensors"))) > 2


def test_gemma_windows_start_with_bos(families):
    run = families("gemma3")
    assert bool((run.tokens[:, 0] == 0).all())
    assert run.report["calibration"]["bos"]
    assert not families("llama").report["calibration"]["bos"]


COMMON = """
import json, sys
{imports}
folders, tensors = json.loads(sys.argv[1]), load_file(sys.argv[2])

def load(name):
    return AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()

def difference(name):
    with torch.no_grad():
        return float((load(name)(tensors["sample"]).logits - tensors[name]).abs().max())
"""
IMPORTS = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
"""
WITH_LRC = (
    COMMON.format(imports=f"import lrc\n{IMPORTS}")
    + """
print(json.dumps({name: difference(name) for name in folders}))
"""
)
WITHOUT_THEN_WITH = (
    COMMON.format(imports=IMPORTS)
    + """
loaded = []
for name in folders:
    try:
        load(name)
        loaded.append(name)
    except RuntimeError as error:
        assert "mismatched" in str(error), error
assert not any(module.split(".")[0] == "lrc" for module in sys.modules)
import lrc
print(json.dumps({"loaded": loaded, "difference": difference("llama")}))
"""
)


@pytest.fixture(scope="module")
def fresh(
    all_families: dict[str, Any],
    sample: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
    worker_id: str,
) -> dict[str, Any]:
    """Run the two scripts on the checkpoints and their expected logits; return their answers."""

    def answers(folder: Path) -> dict[str, Any]:
        file = folder / "logits.safetensors"
        with torch.no_grad():
            logits = {name: run.in_memory()(sample).logits for name, run in all_families.items()}
        save_file({"sample": sample, **logits}, file)
        folders = json.dumps({name: str(run.checkpoint) for name, run in all_families.items()})
        found = {}
        for script in (WITH_LRC, WITHOUT_THEN_WITH):
            command = [sys.executable, "-c", script, folders, str(file)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert ended.returncode == 0, ended.stderr
            found[script] = json.loads(ended.stdout)
        return found

    found: dict[str, Any]
    found = made_once(tmp_path_factory, "families-fresh", answers, worker=worker_id)
    return found


def test_a_fresh_process_gives_the_same_logits(fresh, all_families):
    differences = fresh[WITH_LRC]
    assert set(differences) == set(all_families)
    assert max(differences.values()) <= 1e-5, differences


def test_a_process_without_lrc_refuses_until_lrc_is_imported(fresh):
    answer = fresh[WITHOUT_THEN_WITH]
    assert answer["loaded"] == []
    assert answer["difference"] <= 1e-5
