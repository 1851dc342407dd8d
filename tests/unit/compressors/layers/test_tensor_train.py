"""Chains of cores: contraction in both directions, the whole matrix, and what is cheapest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.layers import ComponentConfig
from lrc.compressors.layers.chain_shape import ChainShape, largest_bond, pattern_for
from lrc.compressors.layers.tensor_train import TensorTrain

SHAPES = [(24, 36), (7, 12), (13, 24), (49, 11), (7, 13), (1, 9), (64, 48)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(shape: tuple[int, int], pattern: str, bond: int) -> TensorTrain:
    chain = ChainShape.of(*shape, pattern, bond)
    cores = {f"core{k}": random(*core, seed=k) for k, core in enumerate(chain.cores, start=1)}
    config = ComponentConfig("tensor_train", {"bond": bond}, pattern=pattern)
    layer = TensorTrain(shape, config, dtype=torch.float64)
    layer.load_state_dict(TensorTrain.encode(**cores))
    return layer.requires_grad_(False)


def entry(layer: TensorTrain, i: int, j: int) -> float:
    """Return one entry by the definition: a product of matrices."""
    outputs, inputs = layer.chain.outputs, layer.chain.inputs
    rows: list[int] = []
    columns: list[int] = []
    for m, n in zip(reversed(outputs), reversed(inputs), strict=True):
        rows, columns = [i % m, *rows], [j % n, *columns]
        i, j = i // m, j // n
    found = random(1, 1) * 0 + 1
    for core, row, column, (a, m, n, b) in zip(
        layer.children(), rows, columns, layer.chain.cores, strict=True
    ):
        weight: Any = core.weight
        found = found @ weight.view(m, b, a, n)[row, :, :, column].T  # [1, b]
    return float(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 17])
def test_every_order_gives_the_dense_product(shape: tuple[int, int], cores: int, rows: int) -> None:
    pattern = pattern_for(*shape, cores)
    try:
        largest = largest_bond(*shape, pattern)
    except ValueError:
        assert shape in [(7, 13), (49, 11), (1, 9)]  # too few factors for as many cores
        assert cores > 2
        return
    for bond in {1, (largest + 1) // 2, largest}:
        layer = layer_of(shape, pattern, bond)
        W, x = layer._dense(), random(rows, shape[1], seed=9)
        i, j = shape[0] // 2, shape[1] // 3
        assert float(W[i, j]) == pytest.approx(entry(layer, i, j), rel=1e-10, abs=1e-10)
        expected = x @ W.T
        close = {"rtol": 1e-10, "atol": 1e-10 * float(expected.abs().max())}
        torch.testing.assert_close(layer(x), expected, **close)
        for contract in (layer._from_first, layer._from_last):
            torch.testing.assert_close(contract(x, rows).reshape(rows, -1), expected, **close)
        torch.testing.assert_close(layer.matrix(), W.float(), rtol=1e-4, atol=1e-4)


def multiplications(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("rows", [1, 3, 40, 1000])
@pytest.mark.parametrize(("pattern", "cheaper"), [("2x12,12x3", "first"), ("6x4,4x9", "last")])
def test_the_order_with_the_fewest_multiplications_is_taken(
    rows: int, pattern: str, cheaper: str
) -> None:
    layer = layer_of((24, 36), pattern, 3)
    chain = layer.chain
    assert (chain.from_first < chain.from_last) == (cheaper == "first")
    contracted = rows * min(chain.from_first, chain.from_last)
    assert multiplications(layer, random(rows, 36)) == min(contracted, chain.whole + rows * 24 * 36)


def test_the_matrix_is_built_for_many_rows_only() -> None:
    layer = layer_of((64, 64), "8x8,8x8", 6)
    few, many = random(1, 64), random(100, 64)
    assert multiplications(layer, few) == layer.multiply_adds(64, 64, layer.config) < 100 * 64 * 64
    assert multiplications(layer, many) == layer.chain.whole + 100 * 64 * 64


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("pattern", ["6x4,4x9", "2x12,12x3"])
def test_an_adapter_on_a_core_counts_in_every_order(rows: int, pattern: str) -> None:
    layer = layer_of((24, 36), pattern, 12)
    changed = layer_of((24, 36), pattern, 12)
    core: Any = layer.core2
    delta = random(*core.weight.shape, seed=5)
    other: Any = changed.core2
    other.weight += delta
    core.register_forward_hook(lambda _, args, y: y + args[0] @ delta.T)
    x = random(rows, 36, seed=3)
    torch.testing.assert_close(layer(x), x @ changed._dense().T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 100])
def test_gradients_of_every_order_are_those_of_the_matrix(rows: int) -> None:
    layer = layer_of((24, 36), "6x4,4x9", 5).requires_grad_(True)
    x = random(rows, 36, seed=3)
    layer(x).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    (x @ layer._dense().T).square().sum().backward()
    expected = [p.grad for p in layer.parameters()]
    assert len(found) == 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
