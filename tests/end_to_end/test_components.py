"""Every component, from a solution to a checkpoint that stock transformers loads and saves."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.shared_runs import DISK
from tests.stored_components import QUANTIZED, SHAPES, TABLES, Stored, component, contents
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc.cli.inspect import describe
from lrc.compressors import prepare
from lrc.compressors.benchmark import fast_paths
from lrc.compressors.benchmark.fast_paths import slow_forms, stored_slow_forms
from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.checkpoint.reader import read_contents
from lrc.compressors.checkpoint.writer import write_config, write_weights
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import (
    COMPONENTS,
    CompressedLinear,
    WeightConfig,
    layer_tensors,
    sentinel,
)
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.compile import Compiled
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe


def test_every_component_is_covered() -> None:
    covered = {each.type for table, _ in TABLES.values() for row in table.values() for each in row}
    assert covered | QUANTIZED == COMPONENTS.keys()


@pytest.fixture(scope="module", params=TABLES)
def stored(request, families, tmp_path_factory) -> Stored:
    """Write a checkpoint of the tiny llama by hand, without any method."""
    table, with_bias = TABLES[request.param]
    modules = {
        name: WeightConfig(SHAPES[name], tuple(components), bias=name == with_bias)
        for name, components in table.items()
    }
    dense = families("llama").dense()
    tensors = {name: t.clone() for name, t in dense.state_dict().items()}
    shared: dict[str, Tensor] = {}
    for name in sorted(modules, key=lambda name: modules[name].shares is not None):  # owners first
        config, linear = modules[name], dense.get_submodule(name)
        parts, W_hat = contents(name, config, linear.weight.detach().double(), shared)
        tensors[f"{name}.weight"] = sentinel()
        for each, part in zip(config.components, parts, strict=True):
            for leaf, tensor in COMPONENTS[each.type].encode(**part).items():
                if f"{each.type}.{leaf}" in config.tensors():  # members lack the shared factor
                    tensors[f"{name}.{each.type}.{leaf}"] = tensor
        with torch.no_grad():
            linear.weight.copy_(W_hat)
        if config.bias:
            bias = torch.linspace(-1, 1, linear.out_features)
            tensors[f"{name}.bias"] = bias
            linear.bias = nn.Parameter(bias.clone())
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    folder = tmp_path_factory.mktemp("components")
    write_weights(folder, {n: t.to("meta") for n, t in tensors.items()}, tensors.__getitem__)
    write_config(folder, dense, quantization_config(modules, {}), "float32")
    return Stored(folder, dense, modules)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
        return logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forms_without_a_fast_path_are_known_without_loading_the_model(
    stored: Stored, dtype: torch.dtype
) -> None:
    found = stored_slow_forms(stored.folder, read_contents(stored.folder), "cpu", dtype)
    assert found == slow_forms(stored.load(dtype=dtype))


def test_a_damaged_layer_is_a_reason(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("index out of range\nmore")

    monkeypatch.setattr(fast_paths, "optimize", fail)
    found = stored_slow_forms(stored.folder, read_contents(stored.folder), "cpu", torch.float32)
    reason = "the layer cannot be loaded (RuntimeError: index out of range)"
    assert {form.reason for form in found} == {reason}
    assert {name for form in found for name in form.weights} == stored.modules.keys()


def assert_same(stored: Stored, logits: Tensor, expected: Tensor) -> None:
    """Demand every bit, but of masks and chains, which have other paths for some modules.

    Weights that are offloaded have no fast path. Cores with adapters, and offloaded ones, are
    always multiplied from the first to the last.
    """
    kinds = {c.type for config in stored.modules.values() for c in config.components}
    other = kinds & {"dictionary", "sparse", "semi_structured", "block_sparse", "tensor_train"}
    # Measured 4e-6 in float32, of logits up to 6.
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5 if other else 0)


def state_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def expected(stored: Stored, sample: Tensor) -> Tensor:
    return logits_of(stored.load(), sample)


@pytest.mark.oldest
def test_it_computes_what_it_represents(stored, sample, expected) -> None:
    # Measured 4e-6, of logits up to 6.
    torch.testing.assert_close(expected, logits_of(stored.dense, sample), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device_map", ["cpu", DISK], ids=["cpu", "disk"])
def test_every_device_map_gives_the_same_logits(stored, sample, expected, tmp_path, device_map):
    model = stored.load(device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in model.parameters()) == ("disk" in str(device_map))
    assert_same(stored, logits_of(model, sample), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_at_load_converts_numbers_and_no_indices(stored, sample, expected, dtype) -> None:
    model = stored.load(dtype=dtype)
    for name, config in stored.modules.items():
        layer = model.get_submodule(name)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        for leaf, spec in layer_tensors(config).items():
            assert layer.state_dict()[leaf].dtype == (spec.dtype or dtype)
    # Measured 0.015 and 0.10, of logits up to 6.
    bound = {torch.float16: 0.03, torch.bfloat16: 0.25}[dtype]
    assert (logits_of(model, sample) - expected).abs().max() <= bound


@pytest.mark.oldest
def test_saving_again_changes_nothing(stored, sample, expected, tmp_path) -> None:
    stored.load().save_pretrained(tmp_path)
    before, after = state_of(stored.folder), state_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert block["modules"] == {name: c.to_json() for name, c in stored.modules.items()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, sample), expected)


# transformers warns that saving needs memory for one shard.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_model_on_disk_is_saved_completely(stored, tmp_path) -> None:
    model = stored.load(device_map=DISK, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "again")
    before, after = state_of(stored.folder), state_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_is_complete(stored, sample, expected) -> None:
    model = stored.load()
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(logits_of(twin, sample), expected)


def test_a_dequantized_model_is_plain(stored, sample, expected, tmp_path) -> None:
    model = stored.load()
    model.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    torch.testing.assert_close(logits_of(model, sample), expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    biases = {f"{n}.bias" for n, config in stored.modules.items() if config.bias}
    assert state_of(tmp_path).keys() == {n for n, _ in stored.dense.named_parameters()}
    assert biases <= state_of(tmp_path).keys()


# PEFT asks for an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_and_merges(stored, sample, expected) -> None:
    model = stored.load()
    # A component need not have a linear child; a dense layer gets gradients through all of them.
    linears = ["model.layers.0.self_attn.v_proj"] + [
        f"{name}.{child}"
        for name in stored.modules
        for child, module in model.get_submodule(name).named_modules()
        if isinstance(module, nn.Linear)
    ]
    config = peft.LoraConfig(r=2, target_modules=linears, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(linears)
    assert_same(stored, logits_of(adapted, sample), expected)
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(2):  # LoRA's B starts at zero, so its A moves in the second step only
        optimizer.zero_grad()
        adapted(sample, labels=sample).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    tuned = logits_of(adapted.eval(), sample)
    assert (tuned - expected).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, sample), tuned, rtol=0, atol=1e-4)


def test_generation_works(stored, sample) -> None:
    model = stored.load()
    tokens = model.generate(sample[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 12)


# Layers of every type are compiled in the tests of the component.
@pytest.mark.parametrize("stored", ["pivoted_low_rank+sparse", "shared dictionary"], indirect=True)
def test_compilation_works(stored, sample) -> None:
    model = stored.load()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(sample).logits, model(sample).logits)


def test_inspect_knows_shape_and_size(stored) -> None:
    facts = describe(stored.folder, verify=False)
    model = stored.load()
    for module in facts["modules"]:
        config, layer = stored.modules[module["name"]], model.get_submodule(module["name"])
        assert module.items() >= config.to_json().items()
        assert module["shape"] == [layer.out_features, layer.in_features]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


SPOILED: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:, None].contiguous(),
    "of another type": lambda tensor: tensor.long(),
}


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_do_not_match_are_refused_by_name(stored, tmp_path, case) -> None:
    (tmp_path / "config.json").write_bytes((stored.folder / "config.json").read_bytes())
    tensors, model = state_of(stored.folder), stored.load(device_map="meta")
    for name in stored.modules:
        for leaf in model.get_submodule(name).state_dict():
            whole = tensors[f"{name}.{leaf}"]
            if case == "of another type" and whole.is_floating_point():
                continue  # a checkpoint may be converted
            spoiled = SPOILED[case](whole)
            content = {k: t for k, t in tensors.items() if k != f"{name}.{leaf}"}
            content |= {} if spoiled is None else {f"{name}.{leaf}": spoiled}
            save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
            for read in (
                AutoModelForCausalLM.from_pretrained,
                partial(describe, verify=False),
            ):
                with pytest.raises(CheckpointError, match=f"{name}.{leaf}: expected") as refused:
                    read(tmp_path)
                assert refused.value.code == "tensor-mismatch"


@pytest.mark.parametrize("family", ["llama", "opt-bare"])
def test_the_pipeline_carries_any_component_from_the_plan(
    family, families, write_recipe, tmp_path, sample, monkeypatch
) -> None:
    """As far as weights are independent and store what the method of the stage makes: two factors.

    Those that share come from a method that groups them, other contents from other methods.
    """
    compile_plan = prepare.compile_plan
    types = ["low_rank", "pivoted_low_rank"]

    def mixed(*args: Any) -> Compiled:
        compiled = compile_plan(*args)
        tasks = [
            task.with_config(replace(task.config, components=(component(types[i % 2], **sizes),)))
            if (sizes := task.config.sizes)
            else task
            for i, task in enumerate(compiled.plan.tasks)
        ]
        return replace(compiled, plan=compiled.plan.with_tasks(tasks))

    run = families(family)
    recipe = write_recipe(tmp_path, run.source)
    monkeypatch.setattr(prepare, "compile_plan", mixed)
    report = compress(load_recipe(recipe), Machine(device="cpu"))
    folder = tmp_path / "run/checkpoint"
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    assert {c["type"] for record in modules.values() for c in record["components"]} == {*types}
    assert report["size"]["targeted"]["bits"] < run.report["size"]["targeted"]["bits"]
    facts = describe(folder, verify=False)
    assert facts["parameters"] == report["size"]["model"]["parameters"]["compressed"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The same ranks from the same statistics: only rounding tells the two apart.
    difference = float((logits_of(model, sample) - logits_of(run.load(), sample)).abs().max())
    assert 0 < difference <= 0.3  # measured 0.1 and 0.04, of logits up to 6
