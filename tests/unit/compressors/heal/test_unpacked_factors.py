"""Integer factors that are trained as numbers and stored as integers again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.heal.unpacked_factors import UnpackedFactor, unpack_factors_
from lrc.compressors.layers import ComponentConfig, CompressedLinear, QuantizationArgs, WeightConfig
from lrc.compressors.layers.packing import unpack_integers
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.compressors.solvers.quantized_matrix import round_to_nearest

INT8 = QuantizationArgs(8)


@pytest.fixture
def layer() -> CompressedLinear:
    """Return a layer of pivot rows and a refinement."""
    generator = torch.Generator().manual_seed(0)
    base = ComponentConfig("pivoted_low_rank", {"rank": 4})
    added = ComponentConfig("low_rank", {"rank": 6}, INT8, ranks=(6, 3, 0))
    made = CompressedLinear(WeightConfig((12, 20), (base, added)), dtype=torch.float32)
    B, A = torch.randn(12, 10, generator=generator), torch.randn(10, 20, generator=generator)
    tensors = {f"pivoted_low_rank.{n}": t.float() for n, t in pivots(B[:, :4], A[:4]).items()}
    tensors["pivoted_low_rank.order"] = tensors["pivoted_low_rank.order"].to(torch.int16)
    for leaf, matrix in (("a.weight", A[4:]), ("b.weight", B[:, 4:])):
        found = round_to_nearest(matrix, INT8, dtype=torch.bfloat16).encode(leaf)
        tensors |= {f"low_rank.{name}": tensor for name, tensor in found.items()}
    made.load_state_dict({**tensors, "weight": torch.zeros(1, dtype=torch.uint8)})
    return made.requires_grad_(False)


def pivots(B: torch.Tensor, A: torch.Tensor) -> dict[str, torch.Tensor]:
    return PivotedLowRank.encode(B=B, A=A)


def unpacked(layer: CompressedLinear) -> tuple[dict[str, nn.Parameter], dict[str, UnpackedFactor]]:
    selected: dict[str, Any] = dict(layer.named_parameters())
    stored: Any = SimpleNamespace(dtypes=lambda names: dict.fromkeys(names, torch.bfloat16))
    return selected, unpack_factors_(layer, selected, stored)


def test_the_layer_computes_the_same_at_every_rank(layer: CompressedLinear) -> None:
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    low_rank: Any = layer.low_rank
    before = []
    for rank in (6, 3, 0):
        low_rank.used_rank = rank
        before.append(layer(x))
    selected, forms = unpacked(layer)
    assert {*forms} == {"low_rank.a.weight", "low_rank.b.weight"}
    assert {*selected} == {*forms, "pivoted_low_rank.a.weight", "pivoted_low_rank.c.weight"}
    for rank, expected in zip((6, 3, 0), before, strict=True):
        low_rank.used_rank = rank
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_what_is_stored_is_what_was_measured(layer: CompressedLinear) -> None:
    selected, forms = unpacked(layer)
    dtypes = {n: torch.float32 if n in forms else torch.bfloat16 for n in selected}
    trained = TrainedParameters(selected, dtypes, forms)
    with torch.no_grad():
        for parameter in selected.values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    rounded = trained.rounded()
    stored = trained.encoded(rounded)
    for name in forms:
        assert name not in stored
        rows, columns = rounded[name].shape
        codes = unpack_integers(stored[f"{name}_packed"], 8, columns)
        assert stored[f"{name}_scale"].shape == (rows, 1)
        assert stored[f"{name}_scale"].dtype == torch.bfloat16
        assert torch.equal(codes * stored[f"{name}_scale"].float(), rounded[name])
        error = (rounded[name] - selected[name].detach()).abs().amax(dim=1)
        assert bool((error <= selected[name].detach().abs().amax(dim=1) / 200).all())


def test_a_row_of_zeros_keeps_a_scale(layer: CompressedLinear) -> None:
    _, forms = unpacked(layer)
    factor = forms["low_rank.b.weight"]
    with torch.no_grad():
        factor.numbers[2] = 0
    stored = factor.encode(factor.selected())
    assert bool((stored["_scale"] != 0).all())
    assert not unpack_integers(stored["_packed"], 8, 6)[2].any()
