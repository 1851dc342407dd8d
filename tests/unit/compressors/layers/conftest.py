"""Memory that nothing has written holds the same values in every test."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    """Let ``torch.empty`` return NaN and the largest integers, and not what was there before.

    Layers that have just been replaced hold such tensors until they are loaded. A test that reads
    one passes or fails by what earlier tests have left in that memory; filled, it always does the
    same. The fill belongs to deterministic algorithms, of which operations without one only warn
    here.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warns)
    torch.utils.deterministic.fill_uninitialized_memory = fills
