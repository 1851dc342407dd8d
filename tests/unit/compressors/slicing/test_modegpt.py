"""Models with narrower MLPs and heads: planned, sliced, saved and loaded by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.slicing import mlp_widths
from lrc.compressors.slicing.layout import Layout, find_layout
from lrc.compressors.slicing.modegpt import Modegpt
from lrc.compressors.slicing.slice_method import Budget
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model
from lrc.configs.slice import Modegpt as Options

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0}
SIZES |= {"eos_token_id": 1, "pad_token_id": 1}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WITH_HEADS = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**GROUPED, rope_parameters=dict(LLAMA3)),
    "qwen2": Qwen2Config(**GROUPED),
}
MLP_ALONE = {
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
}
EVERY = {**WITH_HEADS, **MLP_ALONE}
TOKENS = torch.randint(2, 64, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def equal_shares(monkeypatch):
    """Narrow heads as much as MLPs, so that small models need no tiny budget for it."""
    monkeypatch.setattr(mlp_widths, "HEAD_FRACTION", 1.0)


def make(config: PreTrainedConfig, change: Callable[[Any], None] = lambda _: None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        change(model)
    return model


def plant(model: Any) -> None:
    """Make half of every MLP a copy of the other half, and half of every head redundant."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if not isinstance(module, torch.nn.Linear):
            continue
        for tensor in (module.weight, module.bias):
            if tensor is None:
                continue
            if leaf in ("gate_proj", "up_proj", "fc1", "dense_h_to_4h"):
                tensor[24:] = tensor[:24]
            if leaf == "q_proj":  # pairs 1 and 2 of 4
                tensor.view(4, 2, 4, -1)[:, :, 1:3] = 0
            if leaf == "v_proj":
                tensor.view(2, 2, 4, -1)[:, 1] = 2 * tensor.view(2, 2, 4, -1)[:, 0]


def read(model: Any, folder: Path, dtype: str = "float32") -> tuple[Architecture, WeightReader]:
    model.save_pretrained(folder / "source")
    architecture = build(locate(Model(path=str(folder / "source"), dtype=dtype)))
    return architecture, WeightReader(folder / "source", architecture)


def stored(architecture: Architecture) -> int:
    return sum(p.numel() * p.itemsize for p in architecture.stored_parameters().values())


def budget_for(architecture: Architecture, width: int, head_dim: int | None) -> Budget:
    layout = find_layout(architecture)
    assert isinstance(layout, Layout)
    shapes = layout.shapes(width, head_dim)
    items = {name: p.itemsize for name, p in architecture.stored_parameters().items()}
    n_bytes = sum(torch.Size(s).numel() * items[name] for name, s in shapes.items())
    return Budget("stages[0].slice.keep", n_bytes, stored(architecture))


def options(**changes: Any) -> Options:
    return Options(
        **{"method": "modegpt", "keep": 0.5, "width_multiple": 2, "damp": 1e-6, **changes}
    )


def slice_to(
    architecture: Architecture, reader: WeightReader, budget: Budget, folder: Path, **changes: Any
) -> tuple[Any, dict[str, Any], list[str]]:
    """Slice, save, and load with transformers alone; return also facts and names in order."""
    context = CalibrationContext(
        architecture,
        reader,
        lambda: TOKENS,
        Journal(folder),
        device="cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
    )
    (folder / "work").mkdir(exist_ok=True)
    method = Modegpt()
    config = method.plan(architecture, options(**changes), budget)
    sliced = method.apply(context, options(**changes), config)
    pairs = list(sliced.tensors)
    out = folder / "small"
    sliced.config.save_pretrained(out)
    assert all(tensor.device.type == "cpu" for _, tensor in pairs)
    save_file(dict(pairs), out / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval(), sliced.facts, [name for name, _ in pairs]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("kind", EVERY)
def test_full_width_changes_nothing(kind, tmp_path):
    model = make(EVERY[kind])
    architecture, reader = read(model, tmp_path)
    small, _, names = slice_to(
        architecture, reader, Budget("x", stored(architecture), stored(architecture)), tmp_path
    )
    assert names == list(architecture.stored_parameters())
    assert torch.equal(logits(small), logits(model))


@pytest.mark.parametrize("kind", EVERY)
def test_redundant_channels_are_removed_without_loss(kind, tmp_path):
    model = make(EVERY[kind], plant if kind in WITH_HEADS else lambda m: plant_mlp(m))
    architecture, reader = read(model, tmp_path)
    head_dim = 4 if kind in WITH_HEADS else None
    budget = budget_for(architecture, 24, head_dim)
    small, facts, _ = slice_to(architecture, reader, budget, tmp_path)
    assert sum(p.numel() * 4 for p in small.parameters()) == budget.bytes
    expected = logits(model)
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=2e-3 * float(expected.std()))
    if head_dim:
        assert facts["rotary_pairs"] == [0, 3]
        assert facts["head_dim"] == [8, 4]
        assert small.config.rope_parameters["rope_type"] == "longrope"
    else:
        assert "left alone" in facts["heads"]
    prompt = TOKENS[:1, :8]
    text = small.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert text.shape == (1, 16)


def plant_mlp(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "up_proj", "fc1", "dense_h_to_4h")):
            module.weight[24:] = module.weight[:24]
            if module.bias is not None:
                module.bias[24:] = module.bias[:24]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("keep", [0.9, 0.7])
def test_the_budget_is_met_closely(kind, keep, tmp_path):
    architecture, reader = read(make(EVERY[kind]), tmp_path, "bfloat16")
    dense = stored(architecture)
    small, facts, _ = slice_to(
        architecture, reader, Budget("x", int(keep * dense), dense), tmp_path, damp=1e-3
    )
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    size = sum(p.numel() * 2 for p in small.parameters())
    channel = 2 * 2 * 3 * 33 * 2  # a multiple of two channels in two layers, with biases
    assert keep * dense - channel < size <= keep * dense
    assert dtypes == {torch.bfloat16}
    assert len(facts["layers"]) == 2
    assert all(0 <= layer["lost_mlp"] <= 1 for layer in facts["layers"])


def test_calibration_makes_the_smaller_model_better_than_leaving_channels_out(tmp_path):
    model = make(WITH_HEADS["llama"])
    architecture, reader = read(model, tmp_path)
    budget = budget_for(architecture, 36, None)
    small, _, _ = slice_to(architecture, reader, budget, tmp_path, heads=False)
    for layer in model.model.layers:
        z = torch.arange(48) >= 36
        layer.mlp.down_proj.weight.data[:, z] = 0
    dense = logits(make(WITH_HEADS["llama"]))
    assert (logits(small) - dense).norm() < 0.7 * (logits(model) - dense).norm()


def test_heads_false_leaves_heads(tmp_path):
    architecture, _ = read(make(WITH_HEADS["llama"]), tmp_path)
    dense = stored(architecture)
    config = Modegpt().plan(
        architecture, options(heads=False), Budget("x", int(0.8 * dense), dense)
    )
    assert config.head_dim == 8
    assert config.intermediate_size < 36


def test_heads_are_narrowed_last(tmp_path, monkeypatch):
    architecture, _ = read(make(WITH_HEADS["llama"]), tmp_path)
    dense = stored(architecture)
    monkeypatch.setattr(mlp_widths, "HEAD_FRACTION", 0.2)
    sizes = [
        Modegpt().plan(architecture, options(), Budget("x", int(keep * dense), dense)).head_dim
        for keep in (0.9, 0.7, 0.5, 0.35, 0.25)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8
    assert sizes[-1] < 8


def test_planning_reads_no_weight_and_leaves_the_source_config(tmp_path):
    architecture, _ = read(make(WITH_HEADS["qwen2"]), tmp_path)
    before = architecture.model.config.to_dict()
    dense = stored(architecture)
    Modegpt().plan(architecture, options(), Budget("x", int(0.6 * dense), dense))
    assert architecture.model.config.to_dict() == before
    assert all(p.is_meta for p in architecture.model.parameters())


def test_slicing_is_deterministic(tmp_path):
    architecture, reader = read(make(WITH_HEADS["qwen2"]), tmp_path)
    budget = budget_for(architecture, 24, 4)
    first = slice_to(architecture, reader, budget, tmp_path)
    second = slice_to(architecture, reader, budget, tmp_path)
    assert torch.equal(logits(first[0]), logits(second[0]))
    assert first[1] == second[1]


def test_a_budget_below_the_smallest_widths_is_refused(tmp_path):
    architecture, _ = read(make(WITH_HEADS["llama"]), tmp_path)
    dense = stored(architecture)
    with pytest.raises(RecipeError) as refused:
        Modegpt().plan(architecture, options(), Budget("stages[0].slice.keep", dense // 20, dense))
    for part in (
        "stages[0].slice.keep",
        "must be at least 0.",
        "MLPs of 2 channels and heads of 2",
    ):
        assert part in str(refused.value)


def test_the_smallest_budget_that_the_refusal_names_is_taken(tmp_path):
    architecture, _ = read(make(WITH_HEADS["llama"]), tmp_path)
    least = budget_for(architecture, 2, 2)
    config = Modegpt().plan(architecture, options(), least)
    assert (config.intermediate_size, config.head_dim) == (2, 2)


def test_a_model_without_such_mlps_is_refused(tmp_path):
    architecture, _ = read(make(WITH_HEADS["llama"]), tmp_path)
    mlp = architecture.layers[0].mlp
    mlp.w1 = mlp.gate_proj
    del mlp.gate_proj
    dense = stored(architecture)
    with pytest.raises(RecipeError, match=r"keep: 'modegpt' narrows MLPs.*has 0 modules"):
        Modegpt().plan(architecture, options(), Budget("stages[0].slice.keep", dense, dense))


def test_a_model_that_does_not_follow_its_config_is_refused(tmp_path, monkeypatch):
    architecture, _ = read(make(WITH_HEADS["llama"]), tmp_path)
    dense = stored(architecture)
    monkeypatch.setattr("lrc.compressors.slicing.layout.skeleton", lambda a, _: a.model)
    with pytest.raises(RecipeError, match="does not take the width of its MLPs from intermediate"):
        Modegpt().plan(architecture, options(), Budget("keep", dense // 2, dense))
