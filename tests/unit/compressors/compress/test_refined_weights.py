"""Weights of elastic checkpoints: at every budget the best product of its rank."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lrc.compressors.compress import solve
from lrc.compressors.compress.group import CompressedGroup, WeightGroup
from lrc.compressors.compress.solve import compress_group
from lrc.compressors.layers import CompressedLinear, WeightConfig, reconstruct, sentinel
from lrc.compressors.layers.pivot_rows import NoPivotRows
from lrc.compressors.planning.refinements import refined
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.solvers.moments import Statistics

RANKS = (13, 8, 5, 0)
BASE = 10


@pytest.fixture
def group() -> WeightGroup:
    """Return a weight of falling singular values, which is to be stored for four budgets."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 56, generator=generator, dtype=torch.float64)
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    W = U * 0.9 ** torch.arange(40.0) @ V
    task = LayerTask((Weight("q", 0),), WeightConfig((40, 56)), 16, 0, "svd")
    config = SizeSteps(task, "pivoted_low_rank").config(BASE)
    return WeightGroup(
        replace(task, config=refined(config, RANKS)), [W.float()], [Statistics()], torch.float32
    )


def cut(done: CompressedGroup, index: int) -> Tensor:
    """Return the weight at a budget, from a layer that is cut after loading."""
    layer = CompressedLinear(done.result.config, dtype=torch.float32)
    tensors = {name.removeprefix("q."): tensor for name, tensor in done.tensors.items()}
    layer.load_state_dict({**tensors, "weight": sentinel()})
    layer.cut_(index)
    assert not layer.problems()
    assert set(layer.state_dict()) - {"weight"} == set(layer.config.tensors())
    x = torch.eye(56)
    torch.testing.assert_close(layer(x).T, layer.dense_weight(), rtol=1e-5, atol=1e-5)
    return layer.dense_weight()


@pytest.mark.parametrize("index", range(len(RANKS)))
def test_a_budget_is_the_truncated_svd_up_to_rounding(group: WeightGroup, index: int) -> None:
    W = group.weights[0].double()
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    rank = BASE + RANKS[index]
    best = (U[:, :rank] * s[:rank]) @ V[:rank]
    error = (cut(compress_group(group), index).double() - best).norm() / s[BASE:].norm()
    assert error < (0.01 if RANKS[index] else 1e-5)  # 0.004 of what the refinement holds


def test_the_whole_weight_is_the_largest_budget(group: WeightGroup) -> None:
    done = compress_group(group)
    whole = reconstruct(done.result.config, lambda leaf: done.tensors[f"q.{leaf}"])
    torch.testing.assert_close(whole, cut(done, 0), rtol=1e-6, atol=1e-6)


def test_a_weight_of_low_rank_has_a_smaller_refinement_or_none(group: WeightGroup) -> None:
    for rank, expected in ((BASE + 6, (6, 6, 5, 0)), (BASE, ()), (4, ())):
        U, s, V = torch.linalg.svd(group.weights[0], full_matrices=False)
        low = replace(group, weights=[(U[:, :rank] * s[:rank]) @ V[:rank]])
        config = compress_group(low).result.config
        found = config.components[1].ranks if len(config.components) > 1 else ()
        assert found == expected
        assert config.components[0].sizes["rank"] == min(rank, BASE)


def test_without_pivot_rows_two_factors_take_no_more_at_any_budget(
    group: WeightGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Tensor) -> dict[str, Tensor]:
        raise NoPivotRows("none were found")

    kind = solve.COMPONENTS["pivoted_low_rank"]
    monkeypatch.setattr(kind, "encode", staticmethod(fail))
    done = compress_group(group)
    planned, found = group.task.config, done.result.config
    assert found.types == "low_rank"
    assert "none were found" in (done.result.fallback or "")
    for index in range(len(RANKS)):
        assert group.task.bits_of(found.at_budget(index)) <= group.task.bits_of(
            planned.at_budget(index)
        )
        assert cut(done, index).shape == (40, 56)
