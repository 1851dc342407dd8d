"""A chain of linears, its inputs and their statistics."""

from collections.abc import Callable

import pytest
import torch
from tests.linear_chain import LAYERS, NAMES, TOKENS, WIDTH, Chain, Weights
from torch import Tensor

from lrc.compressors.solvers.moments import Moment, Statistics


@pytest.fixture
def linears() -> Weights:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in NAMES:
        tensors[f"{name}.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        tensors[f"{name}.bias"] = torch.randn(WIDTH, generator=generator)
    return Weights(tensors)


@pytest.fixture
def tokens() -> Tensor:
    """Return inputs of the chain [TOKENS, WIDTH], correlated and with a mean."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(TOKENS, WIDTH, generator=generator) @ mixing + 1


@pytest.fixture
def statistics(linears: Weights, tokens: Tensor) -> Callable[..., Statistics]:
    """Return the statistics of the dense model's inputs, and of random gradients."""
    chain = Chain(linears.tensors, tokens)
    known = {}
    generator = torch.Generator().manual_seed(2)
    for layer in range(LAYERS):
        for (name,) in chain.groups(layer):
            X, _ = chain.inputs(layer, name)
            g = torch.randn(TOKENS, WIDTH, generator=generator).double() * torch.arange(1, 13)
            known[name] = Statistics(
                TOKENS, Moment.of(X.T @ X), Moment.of(g.T @ g), X.sum(dim=0), X.abs().sum(dim=0)
            )
        chain.advance(layer)
    return lambda weight, **_: known[weight.name]
