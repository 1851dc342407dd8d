"""Curves of equal tasks that are computed together equal those of each task alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import QuantizationArgs, WeightConfig
from lrc.compressors.methods.fixed_size import Pruning
from lrc.compressors.planning import rate_distortion
from lrc.compressors.planning.equal_tasks import split_batches
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Allocation
from lrc.compressors.planning.rate_distortion import Curve, curves_for
from lrc.compressors.planning.tasks import LayerTask, QuantizationTask, Weight
from lrc.compressors.solvers.moments import Moment, Statistics

SHAPES = {"up": (24, 16), "down": (16, 24)}
NAMES = [f"experts.{number}.{leaf}" for number in range(5) for leaf in SHAPES]
TYPES = ("pivoted_low_rank", "sparse", "semi_structured")
OPTIONS = {"damp": 1e-6, "gradient_damp": 0.1}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Weights:
    """Replaces a `WeightReader`."""

    def read(self, name: str, *, device: str) -> Tensor:
        name = name.removesuffix(".weight")
        return random(*SHAPES[name.rpartition(".")[2]], seed=NAMES.index(name))


def statistics(weight: Weight) -> Statistics:
    """Return statistics of all weights, except that one saw no tokens and another only zeros."""
    if weight.name == "experts.1.up":
        return Statistics(3)
    number = NAMES.index(weight.name)
    d_out, d_in = SHAPES[weight.name.rpartition(".")[2]]
    x, g = random(90, d_in, seed=number + 50), random(90, d_out, seed=number + 70)
    g = g * (weight.name != "experts.2.up")
    return Statistics(90, Moment.of(x.T @ x), Moment.of(g.T @ g))


def curves(folder: Path, *, schemes: tuple[str, ...]) -> dict[str, Curve]:
    integers = tuple(map(QuantizationArgs.parse, schemes))
    allocation = Allocation(0, "lagrangian", 10**6, BITS, TYPES, integers)
    quantize = QuantizationTask(0, "rtn") if schemes else None
    tasks = [
        LayerTask(
            (Weight(name, 0),),
            WeightConfig(SHAPES[name.rpartition(".")[2]]),
            16,
            0,
            "mixed",
            options=OPTIONS,
            allocation=0,
            quantize=quantize,
        )
        for name in NAMES
    ]
    reader: Any = Weights()
    folder.mkdir()
    return curves_for(
        tasks,
        [allocation],
        reader,
        Journal(folder),
        statistics,
        device="cpu",
        on_step=lambda *_: None,
    )


@pytest.mark.parametrize("schemes", [(), ("int4-g8",)])
def test_curves_of_equal_tasks_do_not_depend_on_how_many_are_computed_together(
    schemes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = curves(tmp_path / "alone", schemes=schemes)
    batches: list[int] = []
    solve = Pruning.squared_errors_of

    def counted(self: Pruning, weights: Any, *args: Any, **options: Any) -> Any:
        batches.append(len(weights))
        return solve(self, weights, *args, **options)

    monkeypatch.setattr(Pruning, "squared_errors_of", counted)
    numbers = 24 * 16 + 24**2 + 16**2
    monkeypatch.setattr(rate_distortion, "NUMBERS", {"cpu": 4 * numbers})
    together = curves(tmp_path / "together", schemes=schemes)
    # Of five tasks of a shape, four are a batch; one of "up" has no statistics. Two component
    # types are pruned.
    assert sorted(batches) == sorted(2 * [3, 1, 4, 1])
    assert [*together] == [*alone] == NAMES
    for name in NAMES:
        one, other = alone[name], together[name]
        assert (one.note, one.n_tokens, one.comparable) == (
            other.note,
            other.n_tokens,
            other.comparable,
        )
        assert [(p.types, p.sizes) for p in one.points] == [
            (p.types, p.sizes) for p in other.points
        ]
        for first, second in (
            (one.energies, other.energies),
            ([p.squared_error for p in one.points], [p.squared_error for p in other.points]),
            ([one.total, *one.quantization.values()], [other.total, *other.quantization.values()]),
        ):
            # Products of stacks may round differently in float32, in which masks are searched.
            torch.testing.assert_close(
                torch.as_tensor(second), torch.as_tensor(first), rtol=1e-3, atol=0
            )
    assert alone["experts.1.up"].note
    assert not alone["experts.2.up"].comparable


def test_batches_have_one_kind_and_a_limited_size() -> None:
    items = ["a1", "b1", "a2", "c1", "a3", "b2", "c2"]
    kinds = {"a": "a", "b": "b", "c": None}

    def batches(limit: int) -> list[list[str]]:
        return split_batches(items, lambda item: kinds[item[0]], lambda _: 10, limit)

    assert batches(100) == [["a1", "a2", "a3"], ["b1", "b2"], ["c1"], ["c2"]]
    assert batches(20) == [["a1", "a2"], ["b1", "b2"], ["c1"], ["a3"], ["c2"]]
    assert batches(0) == [[item] for item in items]
