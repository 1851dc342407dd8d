"""Products with whole matrices in training are those with their factors."""

import pytest
import torch

from lrc.compressors.layers import ComponentConfig, low_rank, pivoted_low_rank
from lrc.compressors.layers.assembled import is_assembled
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank

MODULES = {LowRank: low_rank, PivotedLowRank: pivoted_low_rank}


@pytest.mark.parametrize("kind", [LowRank, PivotedLowRank])
def test_outputs_and_gradients_do_not_change(
    kind: type[LowRank | PivotedLowRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    B, A, x, weights = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((24, 7), (7, 16), (50, 16), (50, 24))
    )
    layer = kind((24, 16), ComponentConfig(kind.TYPE, {"rank": 7}), dtype=torch.float64)
    layer.load_state_dict(kind.encode(B, A))
    found = []
    for assembled in (False, True):
        monkeypatch.setattr(MODULES[kind], "is_assembled", lambda *_, v=assembled: v)
        inputs = x.clone().requires_grad_(True)
        y = layer(inputs)
        found.append([y, *torch.autograd.grad((y * weights).sum(), [inputs, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_factors_are_multiplied_one_by_one_on_a_cpu() -> None:
    a, b = torch.nn.Linear(16, 7), torch.nn.Linear(7, 24)
    assert not is_assembled(torch.zeros(999, 16), a, b, (24, 16))
