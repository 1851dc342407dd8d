"""Matrices by layer and projection, and numbers as text."""

from typing import Any

import pytest

from lrc.compressors.page.matrices import grid_of, labels, matrices_of, mean
from lrc.compressors.page.number_text import nats_text, score_text, seconds_text
from lrc.configs.size import size_text


def record(name: str, nats: float | None = None, rank: int | None = None) -> dict[str, Any]:
    components = [] if rank is None else [{"type": "low_rank", "rank": rank}]
    return {
        "name": name,
        "method": "kfac",
        "config": {"shape": [4, 8], "components": components},
        "bits": 256,
        "dense_bits": 512,
        "relative_error": None,
        "predicted_nats": nats,
        "note": None,
        "fallback": None,
    }


def test_a_grid_has_layers_as_rows_and_projections_as_columns() -> None:
    records = [
        record("model.layers.10.self_attn.q_proj", 0.5, rank=2),
        record("model.layers.2.self_attn.q_proj", 0.25),
        record("model.layers.2.mlp.up_proj", rank=3),
        record("lm_head", 9.0, rank=1),
    ]
    found = matrices_of({"layers": records})
    assert [m.layer for m in found] == [10, 2, 2, None]
    assert found[0].bits_per_weight == 8
    nats = grid_of(found, lambda m: m.predicted_nats, sum)
    assert (nats.rows, nats.columns) == ([2, 10], ["q_proj", "up_proj"])
    assert nats.cells == {(10, "q_proj"): 0.5, (2, "q_proj"): 0.25}
    ranks = grid_of(found, lambda m: m.rank, mean)
    assert ranks.cells == {(10, "q_proj"): 2, (2, "up_proj"): 3}


def test_experts_share_a_cell_and_ambiguous_names_stay_long() -> None:
    names = ["mlp.experts.0.up", "mlp.experts.11.up", "mlp.shared.up", "attn.q"]
    found = matrices_of({"layers": [record(f"model.layers.0.{n}", 1.0) for n in names]})
    assert labels(found) == {
        "mlp.experts.*.up": "mlp.experts.*.up",
        "mlp.shared.up": "mlp.shared.up",
        "attn.q": "q",
    }
    cells = grid_of(found, lambda m: m.predicted_nats, sum).cells
    assert cells == {(0, "mlp.experts.*.up"): 2.0, (0, "mlp.shared.up"): 1.0, (0, "q"): 1.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size_text(1536), "1.5 KiB"),
        (size_text(3 * 2**20), "3.0 MiB"),
        (size_text(2**30 * 1.255), "1.25 GiB"),
        (size_text(None), "unknown"),
        (score_text(None), "not finite"),
        (score_text(18.96616), "18.966"),
        (score_text(48613.2, 144.234), "48,613 ± 144"),
        (score_text(18.96616, 0.25), "18.966 ± 0.250"),
        (score_text(1.5e12, 2e9), "1.500e+12 ± 2.000e+09"),
        (nats_text(0.00012), "1.2e-04"),
        (nats_text(0.0), "0.0000"),
        (seconds_text(119.96), "120.0 s"),
        (seconds_text(150.1), "2 min 30 s"),
        (seconds_text(9000), "2.5 h"),
    ],
)
def test_numbers_are_written_with_units(text: str, expected: str) -> None:
    assert text == expected
