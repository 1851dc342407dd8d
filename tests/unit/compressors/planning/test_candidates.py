"""What an allocator may choose for a low-rank weight."""

from typing import Any

import torch
from torch import Tensor

from lrc.compressors.layers import WeightConfig
from lrc.compressors.planning.candidates import Candidate, candidates_for
from lrc.compressors.planning.measures import MACS
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.tasks import LayerTask, Weight


def candidates(energies: Tensor, d_out: int, d_in: int, **changes: Any) -> list[Candidate]:
    """Return the candidates of a weight, priced in multiply-adds."""
    task = LayerTask(
        weights=(Weight("w", 0),),
        config=WeightConfig((d_out, d_in)),
        number_bits=16,
        stage=0,
        method="svd",
        types="low_rank",
    )
    allocation = Allocation(0, "lagrangian", 0, MACS, ("low_rank",), **changes)
    curve = Curve(energies, 100, total=float(energies.sum()))
    return candidates_for(task, curve, allocation)


def ranks(found: list[Candidate]) -> list[int]:
    """Return the ranks; 0 for the dense weight."""
    return [c.config.sizes.get("rank", 0) for c in found]


def test_candidates_respect_multiples_floor_cap_and_dense() -> None:
    energies = torch.tensor([8.0, 4, 2, 1, 1, 1, 1, 1]).double()
    every = candidates(energies, 8, 12)
    assert ranks(every) == [1, 2, 3, 4, 0]  # rank 5 would cost 100 of 96
    assert [c.cost for c in every] == [20, 40, 60, 80, 96]
    assert [c.loss for c in every] == [11, 7, 5, 4, 0]
    assert ranks(candidates(energies, 8, 12, rank_multiple=2)) == [2, 4, 0]
    assert ranks(candidates(energies, 8, 12, min_keep=41 / 96)) == [3, 4, 0]
    assert ranks(candidates(energies, 8, 12, max_relative_error=0.3)) == [3, 4, 0]
    assert ranks(candidates(energies, 8, 12, max_relative_error=0.01)) == [0]


def test_candidates_end_at_the_numerical_rank() -> None:
    energies = torch.tensor([4.0, 1, 1e-16, 0]).double()
    assert ranks(candidates(energies, 4, 40)) == [1, 2, 0]
    assert ranks(candidates(torch.zeros(4).double(), 4, 40)) == [0]
