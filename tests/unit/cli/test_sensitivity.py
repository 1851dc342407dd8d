"""Tables of losses: columns in the order of the model, totals that are sums, two widths."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from lrc.cli import sensitivity, tables
from lrc.cli.sensitivity import NATS, SHARE, Grid, print_profile, print_sensitivity
from lrc.compressors.compress.profile import Profile
from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.planning.plan import ModelInfo, Plan
from lrc.compressors.planning.summary import WeightSummary, summarize
from lrc.compressors.planning.tasks import LayerResult, LayerTask, Weight

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 3


Compressed = tuple[LayerTask, LayerResult]


def weight(
    layer: int,
    leaf: str,
    method: str = "kfac",
    *,
    rank: int | None,
    loss: float | None = None,
    nats: float | None = None,
    width: int = 576,
) -> Compressed:
    """Return a task with factors of a rank, dense without one, and its result."""
    component = None if rank is None else ComponentConfig("low_rank", {"rank": rank})
    return compressed(f"model.layers.{layer}.{leaf}", layer, method, component, loss, nats, width)


def compressed(
    name: str,
    layer: int,
    method: str,
    component: ComponentConfig | None,
    loss: float | None,
    nats: float | None,
    width: int,
) -> Compressed:
    config = WeightConfig((width, width), () if component is None else (component,))
    task = LayerTask(
        weights=(Weight(name, layer),), config=config, number_bits=16, stage=0, method=method
    )
    found = (None, None) if component is None else (loss, nats)
    return task, LayerResult(config, *found)


@pytest.fixture
def weights() -> list[Compressed]:
    """Return a model with one dense weight, whose first layer lacks two of the weights."""
    found = []
    for layer in range(LAYERS):
        for place, leaf in enumerate(LEAVES):
            if layer == 0 and leaf in ("q_proj", "up_proj"):
                continue
            loss = (layer + 1) * (place + 1) / 100
            dense = (layer, leaf) == (1, "k_proj")
            rank = None if dense else 100 + place
            found.append(weight(layer, leaf, rank=rank, loss=loss, nats=loss / 10))
    return found


def plan_of(weights: list[Compressed]) -> Plan:
    return Plan(
        ModelInfo("s", "bfloat16", "Llama", 0, 0, None, False),
        0,
        {},
        [task for task, _ in weights],
        results={task.name: result for task, result in weights},
        warnings=["too few tokens"],
    )


@pytest.fixture
def matrices(weights: list[Compressed]) -> list[WeightSummary]:
    return summarize(plan_of(weights))


def printed(width: int, monkeypatch: pytest.MonkeyPatch, show: Any, *about: Any) -> list[str]:
    console = Console(highlight=False, width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for module in (sensitivity, tables):
        monkeypatch.setattr(module, "OUT", console)
    show(*about)
    console.file.close()
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    return [" ".join(line.split()) for line in lines]


def test_columns_are_in_the_order_of_the_model(matrices: list[WeightSummary]) -> None:
    assert Grid(matrices, {}, NATS).columns == LEAVES
    assert Grid(matrices[::-1], {}, NATS).columns == LEAVES[::-1]


def test_totals_are_sums_of_nats_and_means_of_fractions(matrices: list[WeightSummary]) -> None:
    nats = Grid(matrices, {m.name: m.result.predicted_nats or 0.0 for m in matrices}, NATS)
    rows = [nats.total(layer=layer) for layer in nats.layers]
    columns = [nats.total(column=column) for column in nats.columns]
    expected = sum(m.result.predicted_nats or 0 for m in matrices)
    assert [sum(rows), sum(columns), nats.total()] == pytest.approx([expected] * 3, rel=1e-12)
    assert rows[2] == pytest.approx(3 * 28 / 1000)
    assert columns[2] == pytest.approx(3 * 6 / 1000)
    assert nats.total(0, "q_proj") is None
    shares = Grid(matrices, {m.name: m.result.relative_error or 0.0 for m in matrices}, SHARE)
    assert shares.total(layer=2) == pytest.approx(3 * 4 / 100)
    assert shares.text(2, "q_proj") == "3.00"


def test_small_numbers_show_digits_that_count() -> None:
    written = [NATS.write(x) for x in (0.0, 1.0, 0.0123, -0.0123, 0.00012345, -0.0001)]
    assert written == ["0.00000", "1.00000", "0.01230", "-0.01230", "1.2e-04", "-1.0e-04"]


def test_ranks_are_shown_next_to_losses_if_they_fit(
    weights: list[Compressed], matrices: list[WeightSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = printed(160, monkeypatch, print_sensitivity, plan_of(weights))
    assert wide[0] == "predicted loss increase, nats per token, and rank"
    assert wide[1] == "layer " + " ".join(LEAVES) + " sum"
    assert wide[2].startswith("0 0.00200 r101 0.00300 r102")
    assert wide[3].startswith("1 0.00200 r100 dense 0.00600 r102")
    assert wide[5].startswith("sum 0.00500 0.00800 0.01800")
    assert wide[6] == "kept " + " ".join(
        f"{sum(m.bits for m in c) / sum(m.dense_bits for m in c):.1%}"
        for c in [*([m for m in matrices if m.name.endswith(leaf)] for leaf in LEAVES), matrices]
    )
    kept = plan_of(weights).kept
    assert wide[7:] == [
        "predicted loss increase, sum: 0.15700 nats per token",
        f"kept {kept:.1%} of the bits of the targeted matrices",
        "warning: too few tokens",
    ]
    narrow = printed(100, monkeypatch, print_sensitivity, plan_of(weights))
    titles = ["predicted loss increase, nats per token", "rank"]
    assert [line for line in narrow if line in titles] == titles
    assert "1 0.00200 dense 0.00600 0.00800 0.01000 0.01200 0.01400 0.05200" in narrow
    assert "1 r100 dense r102 r103 r104 r105 r106" in narrow


def test_predictions_are_shown_next_to_measurements(
    weights: list[Compressed], matrices: list[WeightSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(weights)
    moved = {m.name: 2 * (m.result.predicted_nats or 0) for m in matrices if m.rank is not None}
    profile = Profile(2, 100, 3.0, moved, dict.fromkeys(moved, 0.01))
    wide = printed(160, monkeypatch, print_profile, plan, profile)
    assert wide[0] == "measured divergence from the dense model, nats per token, and predicted"
    assert wide[3].startswith("1 0.00400 0.00200 dense 0.01200 0.00600")
    assert wide[6:] == [
        "sum measured 0.31400 nats per token, sum predicted 0.15700 nats per token",
        "rank correlation of measured and predicted (Spearman): 1.000",
        "measured over 100 tokens (--profile 2)",
        f"cross-entropy of the text: dense 3.0000, increased by {len(moved) / 100:.4f} nats per "
        "token, summed over the matrices",
    ]
    narrow = printed(100, monkeypatch, print_profile, plan, profile)
    assert "1 0.00400 dense 0.01200 0.01600 0.02000 0.02400 0.02800 0.10400" in narrow


@pytest.mark.parametrize("rank", [9, None])
def test_shared_factors_are_explained_only_where_there_are_some(
    rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of layers of which no factor pays stays one task of dense weights."""
    task, result = weight(0, "up_proj", "basis-sharing", rank=rank, loss=0.5)
    both = Weight(task.name, 0), Weight("model.layers.1.up_proj", 1)
    plan = plan_of([(replace(task, weights=both), result), weight(0, "q_proj", rank=9, nats=0.5)])
    measured = {} if rank is None else {task.name: 0.1}
    lines = printed(160, monkeypatch, print_profile, plan, Profile(2, 100, 3.0, measured, measured))
    explained = "matrices that share a factor count as one, in the row of the first" in lines
    assert explained == (rank is not None)


def test_methods_that_predict_no_nats_have_a_table_of_fractions(
    weights: list[Compressed], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_sided = [weight(layer, "extra", "svd", rank=9, loss=0.5) for layer in range(LAYERS)]
    lines = printed(160, monkeypatch, print_sensitivity, plan_of([*weights, *one_sided]))
    first, second = (lines.index(f"{q.name}, {q.unit}, and rank") for q in (NATS, SHARE))
    assert all("extra" not in line for line in lines[first:second])
    assert lines[second + 1 : second + 3] == ["layer extra mean", "0 50.00 r9 50.00"]
    assert "predicted relative error, mean: 50.00 %" in lines


def test_weights_of_one_place_share_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of experts, whose names end alike."""
    alike = [weight(0, f"experts.{i}.up_proj", rank=10 + i, loss=0.1, nats=0.01) for i in range(3)]
    lines = printed(160, monkeypatch, print_sensitivity, plan_of(alike))
    assert lines[2] == "0 0.03000 r10-12 0.03000"


def test_rows_are_layers_in_order(matrices: list[WeightSummary]) -> None:
    assert all(a < b for a, b in pairwise(Grid(matrices[::-1], {}, NATS).layers))


def pruned(method: str) -> Compressed:
    half = ComponentConfig("sparse", {"nonzeros": 2048})
    return compressed("layers.0.q", 0, method, half, None, 0.5, 64)


def test_components_without_ranks_show_the_fraction_of_the_bits_they_keep() -> None:
    low = ComponentConfig("low_rank", {"rank": 8})
    both = [pruned("mixed"), compressed("layers.0.k", 0, "mixed", low, None, 0.25, 64)]
    grid = Grid(summarize(plan_of(both)), {}, NATS)
    assert [grid.size(0, "q"), grid.size(0, "k")] == ["56%", "r8"]


def test_a_plan_of_components_without_ranks_is_not_shown_as_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "\n".join(printed(80, monkeypatch, print_sensitivity, plan_of([pruned("sparse")])))
    assert "dense" not in text
    assert "rank or fraction of the bits" in text
    assert "predicted loss increase, sum: 0.5" in text
