"""Checkpoints that an engine cannot run are rejected by name; tensors must be complete."""

import pytest
import torch

from lrc.compressors.integrations.serving_checks import (
    LayerTensors,
    check_supported,
    check_used,
    check_version_of,
    embedding_name,
    fused_names,
)
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig, layer_tensors
from lrc.configs.errors import CheckpointError

Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
LOW_RANK = WeightConfig((8, 6), (ComponentConfig("low_rank", {"rank": 2}),))
TENSORS = {
    "weight": torch.zeros(1, dtype=torch.uint8),
    "low_rank.a.weight": torch.ones(2, 6),
    "low_rank.b.weight": torch.ones(8, 2),
}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"shapes": {Q_PROJ: [4, 6]}}, "shapes: layers have other widths"),
        ({"biases": [Q_PROJ]}, "biases: layers have biases"),
        ({"norms": {"model.norm": {}}}, "norms: blocks use their own bases"),
        (
            {"parent": {"tensors": {"head": "head.weight"}}},
            "parent: weights are read from the parent",
        ),
    ],
    ids=str,
)
def test_tables_that_engines_do_not_know_are_rejected(table, words) -> None:
    with pytest.raises(CheckpointError, match=f"{words}.*which Engine 1.2 does not") as refused:
        check_supported(table, {Q_PROJ: LOW_RANK}, "Engine 1.2")
    assert refused.value.code == "unsupported-by-engine"
    check_supported({key: type(value)() for key, value in table.items()}, {}, "Engine 1.2")


def test_shared_factors_are_rejected() -> None:
    shares = ComponentConfig("low_rank", {"rank": 2}, shares=K_PROJ)
    modules = {K_PROJ: LOW_RANK, Q_PROJ: WeightConfig((8, 6), (shares,))}
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}.*shares a factor with {K_PROJ}.*svd-llm"):
        check_supported({}, modules, "Engine 1.2")


def test_layers_that_the_engine_lacks_are_rejected() -> None:
    with pytest.raises(CheckpointError, match=rf"no linear layer or embedding for {Q_PROJ};"):
        check_used([Q_PROJ, K_PROJ], [K_PROJ], "Engine 1.2")
    check_used([K_PROJ], [K_PROJ], "Engine 1.2")


def test_tensors_of_a_plain_checkpoint_have_no_prefix_and_no_sentinel() -> None:
    part = LayerTensors(Q_PROJ, QuantizationArgs.parse("int8"), (8, 6))
    assert part.expected.keys() == {"weight_packed", "weight_scale", "weight_shape"}
    for name, spec in part.expected.items():
        part.add(name, torch.zeros(spec.shape, dtype=spec.dtype or torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"weight: expected nothing, found \[1\]"):
        part.add("weight", TENSORS["weight"])
    assert part.config is not None
    assert part.take(torch.device("cpu")).keys() == layer_tensors(part.config).keys()


def test_all_tensors_of_a_layer_are_taken_once() -> None:
    part = LayerTensors(Q_PROJ, LOW_RANK, (8, 6))
    for name, tensor in TENSORS.items():
        part.add(name, tensor)
    taken = part.take(torch.device("cpu"))
    assert taken.keys() == TENSORS.keys()
    with pytest.raises(CheckpointError, match="missing"):
        part.take(torch.device("cpu"))


@pytest.mark.parametrize("missing", TENSORS)
def test_missing_tensors_are_named(missing) -> None:
    part = LayerTensors(Q_PROJ, LOW_RANK, (8, 6))
    for name in TENSORS.keys() - {missing}:
        part.add(name, TENSORS[name])
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}: .*missing: {missing};") as refused:
        part.take(torch.device("cpu"))
    assert refused.value.code == "tensor-mismatch"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("low_rank.a.weight", torch.ones(3, 6), r"expected \[2, 6\].*found \[3, 6\]"),
        ("low_rank.a.weight", torch.ones(2, 6, dtype=torch.int32), "floating-point numbers"),
        ("weight", torch.ones(8, 6), r"weight: expected \[1\], torch.uint8, found \[8, 6\]"),
        ("sparse.values", torch.ones(3), "sparse.values: expected nothing"),
    ],
)
def test_other_tensors_are_named(name, tensor, words) -> None:
    part = LayerTensors(Q_PROJ, LOW_RANK, (8, 6))
    with pytest.raises(CheckpointError, match=words):
        part.add(name, tensor)


def test_a_layer_without_compression_has_its_weight_alone() -> None:
    part = LayerTensors(Q_PROJ, None, (8, 6))
    with pytest.raises(CheckpointError, match=r"weight: expected \[8, 6\]"):
        part.add("weight", TENSORS["weight"])
    part.add("weight", torch.ones(8, 6, dtype=torch.bfloat16))
    assert part.take(torch.device("cpu"))["weight"].shape == (8, 6)


def test_a_layer_of_another_shape_is_rejected() -> None:
    with pytest.raises(CheckpointError, match=r"shape must be \[8, 4\], got \[8, 6\]"):
        LayerTensors(Q_PROJ, LOW_RANK, (8, 4))


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0", "dev"])
def test_other_versions_of_an_engine_are_rejected(version) -> None:
    with pytest.raises(CheckpointError, match=f"vllm: must be at least 0.32 .* got {version};"):
        check_version_of("vllm", version, (0, 32), (0, 33))


def test_tested_versions_are_accepted() -> None:
    for version in ("0.32.0", "0.32.1.post1", "0.32.2+cpu"):
        check_version_of("vllm", version, (0, 32), (0, 33))


def test_names_of_fused_layers() -> None:
    mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert fused_names("a.qkv_proj", mapping) == ["a.q_proj", "a.k_proj", "a.v_proj"]
    assert fused_names("a.o_proj", mapping) == ["a.o_proj"]
    assert fused_names("lm_head", mapping) == ["lm_head"]


def test_an_embedding_without_a_name_is_found_by_its_shape() -> None:
    rows = WeightConfig((50, 6), (ComponentConfig("dense", {}, QuantizationArgs(8)),))
    modules = {"model.embed_tokens": rows, "lm_head": rows, Q_PROJ: LOW_RANK}
    assert embedding_name("", (50, 6), modules) == "model.embed_tokens"
    assert embedding_name("lm_head", (50, 6), modules) == "lm_head"
    assert embedding_name("", (60, 6), modules) is None
    assert embedding_name("transformer.wte", (50, 6), modules) is None
    assert embedding_name("", (50, 6), {**modules, "model.other": rows}) is None
