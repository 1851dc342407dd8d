"""Small matrices, and inputs with massive channels, for the tests of quantization."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Matrices = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def matrices() -> Matrices:
    """Make a weight [rows, columns] and a second moment of its inputs."""

    def make(rows: int = 12, columns: int = 32, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        X = normal(4 * columns, columns) @ normal(columns, columns)
        X[:, 3] *= 20  # a massive channel
        return normal(rows, columns), X.T @ X

    return make
