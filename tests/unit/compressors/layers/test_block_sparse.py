"""Quantized groups of which some are stored: their tensors, product, sizes and planning."""

from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.layers import (
    ComponentConfig,
    CompressedLinear,
    QuantizationArgs,
    WeightConfig,
    layer_tensors,
    sentinel,
)
from lrc.compressors.layers.block_sparse import BlockSparse
from lrc.compressors.planning.tasks import QuantizationTask
from lrc.compressors.solvers.quantize_blocks import QuantizedBlocks

D_OUT, D_IN = 12, 88  # 11 groups of 8 a row: no whole number of bytes of the mask


def config_of(groups: int, args: QuantizationArgs | None) -> WeightConfig:
    return WeightConfig((D_OUT, D_IN), (ComponentConfig("block_sparse", {"groups": groups}, args),))


def example(groups: int, args: QuantizationArgs) -> QuantizedBlocks:
    """Draw codes over the whole range, and which groups they are."""
    generator = torch.Generator().manual_seed(0)
    assert args.group_size is not None
    per_row = args.groups(D_IN)
    order = torch.randperm(D_OUT * per_row, generator=generator)
    mask = (order < groups).view(D_OUT, per_row)
    size = (groups, args.group_size)
    codes = torch.randint(args.lowest, args.highest + 1, size, generator=generator)
    scale = torch.randn(groups, generator=generator).bfloat16()
    return QuantizedBlocks(codes.to(torch.int8), scale, mask, args)


def layer_of(found: QuantizedBlocks, *, bias: bool = False) -> CompressedLinear:
    model = nn.Module()
    model.layer = nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.bfloat16)
    config = config_of(len(found.codes), found.scheme)
    assert WeightConfig.from_json(config.to_json()) == config
    replace_layers(model, {"layer": config})
    encoded = BlockSparse.encode(found.codes, found.scale, found.mask, found.scheme)
    state = {f"layer.block_sparse.{leaf}": tensor for leaf, tensor in encoded.items()}
    state["layer.weight"] = sentinel()
    if bias:
        state["layer.bias"] = torch.arange(D_OUT).bfloat16()
    model.load_state_dict(state)
    layer: CompressedLinear = model.layer
    assert not layer.problems()
    return layer


@pytest.mark.parametrize("written", ["int4-g8", "int3-g8", "int2-g22", "int8-g88", "int5-g1"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_counted_bits_are_those_of_the_file(written: str, fraction: float, tmp_path: Path) -> None:
    args = QuantizationArgs.parse(written)
    per_row = args.groups(D_IN)
    groups = max(int(fraction * D_OUT * per_row), 1)
    layer, config = layer_of(example(groups, args)), config_of(groups, args)
    save_file(layer.state_dict(), tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    n_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")  # but for the header
    numbers = groups * (args.group_size or 0)
    by_hand = 32 * ceil(numbers * args.bits / 32) + 16 * groups + 8 * D_OUT * ceil(per_row / 8) + 8
    assert n_bytes * 8 == config.stored_bits(16) == by_hand
    assert config.parameters() == numbers
    assert {name: ([*t.shape], t.dtype) for name, t in layer.state_dict().items()} == {
        name: (spec.shape, spec.dtype or torch.bfloat16)
        for name, spec in layer_tensors(config).items()
    }


@pytest.mark.parametrize("written", ["int4-g8", "int3-g22"])
@pytest.mark.parametrize("bias", [False, True])
def test_computes_the_product_and_becomes_dense(written: str, bias: bool) -> None:
    found = example(30, QuantizationArgs.parse(written))
    layer = layer_of(found, bias=bias)
    W_hat = found.weight().bfloat16()
    assert torch.equal(layer.dense_weight(), W_hat.float())
    x = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = nn.functional.linear(x, W_hat)
    expected = expected if layer.bias is None else expected + layer.bias
    assert torch.equal(layer(x), expected)
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert torch.equal(dense(x), nn.functional.linear(x, W_hat, layer.bias))
    layer(x).float().square().sum().backward()
    scale = layer.get_parameter("block_sparse.values_scale")
    assert scale.grad is not None
    assert bool(scale.grad.all())


def test_the_whole_layer_compiles_as_one_graph() -> None:
    layer = layer_of(example(30, QuantizationArgs.parse("int4-g8")))
    torch.compiler.reset()
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.ones(2, D_IN).bfloat16()
    assert torch.equal(graph(x), layer(x))


@pytest.mark.parametrize("written", [None, "int4", "int4-g8-asymmetric"])
def test_groups_need_a_symmetric_quantization_with_a_group_size(written: str | None) -> None:
    record: dict[str, Any] = config_of(30, QuantizationArgs.parse("int4-g8")).to_json()
    record["components"][0]["quantization"] = written
    words = f"must be symmetric with a group size, like int4-g16, got {written}"
    with pytest.raises(ValueError, match=words):
        WeightConfig.from_json(record)


@pytest.mark.parametrize(
    ("groups", "written", "words"),
    [
        (133, "int4-g8", r"groups must be in \[1, 132\] for \[12, 88\], got 133"),
        (3, "int4-g16", "rows of 88 numbers are not a multiple of the group size 16"),
    ],
)
def test_sizes_that_no_weight_can_have_are_rejected(groups: int, written: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(groups, QuantizationArgs.parse(written)).tensors()


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 132), (0.5, 66), (0.25, 99), (0.999, 1)])
def test_a_plan_keeps_the_fraction_that_is_not_removed(sparsity: float, kept: int) -> None:
    args = QuantizationArgs.parse("int4-g8")
    how = QuantizationTask(0, "gptq", args, sparsity=sparsity)
    planned = how.applied_to(WeightConfig((D_OUT, D_IN)))
    assert planned == config_of(kept, args)
    assert planned.description == f"{kept} groups"


def test_only_groups_of_the_mask_are_not_zero() -> None:
    layer = layer_of(example(1, QuantizationArgs.parse("int4-g8")))
    product: Tensor = layer.dense_weight()
    assert int((product.view(D_OUT, -1, 8) != 0).any(dim=2).sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int2-g8", "int3-g8", "int4-g8", "int8-g8"])
def test_on_a_cpu_the_fast_path_multiplies_by_all_groups(scheme, dtype, rounding):
    args = QuantizationArgs.parse(scheme)
    component = layer_of(example(40, args)).components[0].to(dtype).requires_grad_(False)
    assert isinstance(component, BlockSparse)
    before = {name: tensor.clone() for name, tensor in component.state_dict().items()}
    if component.optimize() is not None:
        pytest.skip(component.reason)  # needs a processor with AVX2
    for rows in (1, 3, 17):
        x = torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(rows)).to(dtype)
        matrix = component.matrix().double()
        exact = x.double() @ matrix.T
        bound = (x.double().abs() @ matrix.abs().T).max()
        error = (component(x).double() - exact).abs().max()
        # Products of codes and scales are rounded by the plain path only.
        assert error <= bound * (rounding(D_IN, torch.float32) + 3 * torch.finfo(dtype).eps)
    assert all(torch.equal(before[name], now) for name, now in component.state_dict().items())
    component.values_scale.mul_(2)  # a step of an optimizer is seen at once
    torch.testing.assert_close(component(x), (2 * exact).to(dtype), rtol=0.05, atol=float(bound))
    component.restore()
    assert not component._derived
