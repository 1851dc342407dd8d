"""Layers of vLLM with compressed weights, whole and divided among devices, without an engine."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    CompressedLinear,
    QuantizationArgs,
    WeightConfig,
    sentinel,
)
from lrc.compressors.layers.packing import encode_matrix

with warnings.catch_warnings():  # of vLLM's imports
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    from vllm.model_executor import parameter

    from lrc.compressors.integrations.vllm_methods import CompressedLinearMethod

pytestmark = pytest.mark.filterwarnings("ignore")

D_IN = 64
INT4 = QuantizationArgs.parse("int4-g32")
X = torch.randn(7, D_IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of vLLM ask for the group of processes, which an engine makes."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def stored(kind: str, d_out: int) -> tuple[WeightConfig | None, dict[str, Tensor]]:
    """Return the configuration and the tensors of a random layer."""
    if kind == "plain":
        return None, {"weight": numbers(d_out, D_IN)}
    if kind == "integers":
        config = ComponentConfig("dense", {}, INT4)
        codes = torch.randint(-8, 8, (d_out, D_IN), generator=torch.Generator().manual_seed(d_out))
        tensors = encode_matrix("weight", codes, numbers(d_out, 2).abs() + 0.01, None, INT4)
    else:
        config = ComponentConfig(kind, {"rank": 9})
        tensors = COMPONENTS[kind].encode(B=numbers(d_out, 9), A=numbers(9, D_IN))
    named = {f"{config.type}.{name}": tensor for name, tensor in tensors.items()}
    return WeightConfig((d_out, D_IN), (config,)), {**named, "weight": sentinel()}


def reference(config: WeightConfig | None, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    if config is None:
        return nn.functional.linear(x, tensors["weight"])
    layer = CompressedLinear(config)
    layer.load_state_dict(tensors)
    y: Tensor = layer(x)
    return y.detach()


def served(
    parts: list[tuple[WeightConfig | None, dict[str, Tensor]]],
    shards: list[Any],
    sizes: list[int],
    output_size: int,
    *,
    rank: int = 0,
    devices: int = 1,
    d_in: int = D_IN,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, CompressedLinearMethod, list[Any]]:
    """Create a layer as vLLM does, load the tensors, and return it with its method and reports."""
    reports: list[Any] = []
    names = [f"part{i}" for i in range(len(parts))]
    method = CompressedLinearMethod(
        names, [config for config, _ in parts], lambda *report: reports.append(report)
    )
    layer = nn.Module()
    vars(layer).update(tp_rank=rank, tp_size=devices, has_bias=False)
    method.create_weights(layer, d_in, sizes, D_IN, output_size, dtype)
    for (_, tensors), shard in zip(parts, shards, strict=True):
        for name, tensor in tensors.items():
            parameter: Any = layer.get_parameter(name)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    method.process_weights_after_loading(layer)
    return layer, method, reports


KINDS = ["low_rank", "pivoted_low_rank", "integers", "plain"]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_one_layer(kind) -> None:
    part = stored(kind, 96)
    layer, method, reports = served([part], [None], [96], 96)
    torch.testing.assert_close(method.apply(layer, X), reference(*part, X), rtol=1e-4, atol=1e-4)
    # Kernels for integers multiply inputs of 16 bits.
    assert [report[:2] for report in reports] == [(["part0"], ["int4-g32"] * (kind == "integers"))]
    bias = numbers(96)
    with_bias = method.apply(layer, X, bias)
    torch.testing.assert_close(with_bias, method.apply(layer, X) + bias)


@pytest.mark.parametrize("divided", [False, True])
def test_integers_are_multiplied_by_a_kernel_in_16_bits(divided) -> None:
    part = stored("integers", 64)
    found = []
    for rank in range(1 + divided):
        rows = 64 // (1 + divided)
        layer, method, reports = served(
            [part], [None], [rows], 64, rank=rank, devices=1 + divided, dtype=torch.bfloat16
        )
        assert reports[0][1] == []
        found.append(method.apply(layer, X.bfloat16()).float())
    # Sums of 64 products of bfloat16 numbers, which are rounded to 2 ** -8.
    torch.testing.assert_close(torch.cat(found, -1), reference(*part, X), rtol=0.03, atol=0.03)


def test_fused_layers_of_different_forms() -> None:
    parts = [stored(kind, 32) for kind in ("pivoted_low_rank", "plain", "integers")]
    layer, method, _ = served(parts, ["q", "k", "v"], [32] * 3, 96)
    expected = torch.cat([reference(*part, X) for part in parts], dim=-1)
    torch.testing.assert_close(method.apply(layer, X), expected, rtol=1e-4, atol=1e-4)


def test_outputs_are_divided_among_devices() -> None:
    parts = [stored(kind, 64) for kind in KINDS]
    found = []
    for rank in range(2):
        layer, method, _ = served(parts, [0, 1, 2, 3], [32] * 4, 256, rank=rank, devices=2)
        found.append(method.apply(layer, X).split(32, dim=-1))
    whole = torch.cat([torch.cat(each, dim=-1) for each in zip(*found, strict=True)], dim=-1)
    expected = torch.cat([reference(*part, X) for part in parts], dim=-1)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_inputs_are_divided_among_devices(kind) -> None:
    part = stored(kind, 96)
    total = torch.zeros(())
    for rank in range(2):
        layer, method, _ = served([part], [None], [96], 96, rank=rank, devices=2, d_in=32)
        total = total + method.apply(layer, X[:, 32 * rank : 32 * rank + 32].contiguous())
    torch.testing.assert_close(total, reference(*part, X), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_fused_in_the_checkpoint_is_not_divided() -> None:
    with pytest.raises(Exception, match="divides this layer into 2 parts"):
        served([stored("low_rank", 96)], [None], [24, 24], 96, devices=2)


def test_a_bias_that_the_engine_lacks_is_an_error() -> None:
    config = WeightConfig((8, D_IN), (ComponentConfig("low_rank", {"rank": 2}),), bias=True)
    method = CompressedLinearMethod(["part"], [config], lambda *_: None)
    layer: Any = SimpleNamespace(has_bias=False)
    with pytest.raises(Exception, match="part: has a bias that the SimpleNamespace of vLLM lacks"):
        method.create_weights(layer, D_IN, [8], D_IN, 8, torch.float32)
