"""Pivoted low rank: smaller than two factors of the same product, with compact indices."""

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.configs.errors import CheckpointError


def config(kind: str, shape: tuple[int, int], rank: int) -> WeightConfig:
    return WeightConfig(shape, (ComponentConfig(kind, {"rank": rank}),))


def gaussian(d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    return B, torch.randn(rank, d_in, generator=g, dtype=torch.float64)


def test_smaller_and_less_work_than_factors_at_every_rank() -> None:
    d_out, d_in = 96, 64
    for rank in range(1, 65):
        factors, pivoted = (
            config(kind, (d_out, d_in), rank) for kind in ("low_rank", "pivoted_low_rank")
        )
        saved = factors.stored_bits(16) - pivoted.stored_bits(16)
        assert saved == 16 * rank * rank - 16 * d_out  # rank^2 numbers, for the order
        assert factors.multiply_adds() - pivoted.multiply_adds() == rank * rank


def test_order_is_as_small_as_its_numbers_allow() -> None:
    for d_out, dtype in ((32767, torch.int16), (32768, torch.int32)):
        specs = config("pivoted_low_rank", (d_out, 4), 2).tensors()
        assert specs["pivoted_low_rank.order"].dtype == dtype
        encoded = PivotedLowRank.encode(*gaussian(d_out, 4, 2))
        assert encoded["order"].dtype == dtype
        assert int(encoded["order"].max()) == d_out - 1


def test_dependent_columns_are_rejected() -> None:
    B, A = gaussian(30, 20, 8)
    B[:, 7] = 0
    with pytest.raises(
        ValueError, match=r"\[30, 8\] must have full column rank, got numerical rank 7"
    ):
        PivotedLowRank.encode(B, A)


def test_a_rank_above_the_rows_is_rejected_by_name() -> None:
    model = nn.Module()
    model.layer = nn.Linear(40, 24, bias=False)
    words = r"modules\['layer'\]: rank must be in \[1, 24\] for \[24, 40\], got 30"
    with pytest.raises(CheckpointError, match=words):
        replace_layers(model, {"layer": config("pivoted_low_rank", (24, 40), 30)})
