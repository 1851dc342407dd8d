"""Running sums over tokens."""

import torch

from lrc.compressors.calibrate.statistic_table import RunningSums


def test_second_moments_add_up_over_batches_and_leading_dimensions() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    sums = RunningSums()
    sums.add_square("H", x[:1])
    sums.add_square("H", x[1:])
    rows = x.reshape(-1, 8)
    torch.testing.assert_close(sums["H"], rows.T @ rows)
