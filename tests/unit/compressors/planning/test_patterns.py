"""Pattern 2:4: which sizes it has, what it costs, and which specs may claim it."""

from typing import Any

import pytest
import torch
from torch import nn

from lrc.compressors.checkpoint.format import check_modules
from lrc.compressors.checkpoint.quantizer import swap_in_forms
from lrc.compressors.layers import FORMS, Sparse, SparseDictionary
from lrc.compressors.methods.base import CodedMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.plan import Matrix, read_matrices, record_of
from lrc.compressors.planning.user_plan import Entry, GivenPlan, apply_given
from lrc.compressors.planning.weight_groups import Unit
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import CheckpointError

SHAPES = [(4, 4), (16, 24), (24, 16), (30, 44), (7, 12)]  # d_out, d_in
PRUNING = ["magnitude", "wanda", "sparse"]
DICTIONARIES = ["compot", "dictionary"]


def unit(form: str, shape: tuple[int, int], method: str = "sparse") -> Unit:
    bits = shape[0] * shape[1] * 16
    return Unit((Matrix("m", 0, shape, 0, method, form, None, bits, bits, pattern="2:4"),))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pruned_matrix_has_one_size(shape: tuple[int, int]) -> None:
    pruned = unit("sparse", shape)
    for step in (1, 5, pruned.largest_step):
        assert pruned.sizes_at(step) == {"nonzeros": shape[0] * shape[1] // 2}
    dense = pruned.dense_cost("bits")
    share = pruned.step_cost(1, "bits") / dense
    assert pruned.step_within(share, "bits") > 0
    assert pruned.step_within(share - 1e-6, "bits") == 0
    assert pruned.cheapest("bits", multiple=1, min_keep=0) == pruned.step_cost(1, "bits")


def test_it_takes_half_of_the_values_and_four_bits_a_group() -> None:
    d_out, d_in = 576, 1536
    marker = 8
    bits = Sparse.stored_bits(d_out, d_in, bits=16, nonzeros=d_out * d_in // 2)
    assert bits == d_out * d_in // 4 * (2 * 16 + 4) + marker
    assert (bits - marker) / (16 * d_out * d_in) == 0.5625
    dictionary = SparseDictionary.stored_bits(d_out, d_in, bits=16, atoms=256, nonzeros=128)
    assert dictionary == 256 * d_in * 16 + 256 * d_out // 4 * (2 * 16 + 4) + marker


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dictionary_has_a_multiple_of_four_atoms_and_half_as_many_coefficients(
    shape: tuple[int, int],
) -> None:
    learnt = unit("dictionary", shape)
    sizes = [learnt.sizes_at(step) for step in range(1, learnt.largest_step + 1)]
    assert sizes[0] == {"atoms": 4, "nonzeros": 2}
    assert sizes[-1]["atoms"] == min(shape) // 4 * 4  # as near to a complete basis as it comes
    assert all(s["atoms"] % 4 == 0 and s["nonzeros"] == s["atoms"] // 2 for s in sizes)
    costs = [learnt.bits(s) for s in sizes]
    assert costs == sorted(costs)
    assert len({s["atoms"] for s in sizes}) == min(shape) // 4  # every size there is


@pytest.mark.parametrize(
    ("form", "shape", "words"),
    [
        ("sparse", (8, 6), "pattern 2:4 needs inputs in fours, got a weight [8, 6]"),
        ("dictionary", (3, 8), "pattern 2:4 needs four atoms or more, got a weight [3, 8]"),
    ],
)
def test_a_shape_without_groups_of_four_is_refused(form, shape, words) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        unit(form, shape).sizes_at(1)
    assert str(caught.value) == words


def known(shape: tuple[int, int]) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    X, g = (
        torch.randn(300, side, generator=generator, dtype=torch.float64) for side in shape[::-1]
    )
    X = X * torch.linspace(0.2, 3, shape[1], dtype=torch.float64)
    return Statistics(300, inputs=Moment.of(X.T @ X), gradients=Moment.of(g.T @ g))


def coded(name: str) -> CodedMethod:
    method = METHODS[name]
    assert isinstance(method, CodedMethod)
    return method


@pytest.mark.parametrize("name", PRUNING + DICTIONARIES)
def test_every_four_hold_two_and_the_curve_says_what_that_loses(name: str) -> None:
    shape, method = (16, 24), coded(name)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = dict(unit(method.form, shape).sizes_at(6))
    found = method.solve(W, known(shape), sizes, pattern="2:4")
    mask = found.parts["mask"] if method.form == "sparse" else found.parts["mask"].T
    assert bool((mask.reshape(-1, 4).sum(dim=1) == 2).all())
    shapes = FORMS[method.form].shapes(*shape, {**sizes, "pattern": "2:4"}, bias=False)
    encoded = FORMS[method.form].encode(**found.parts)
    assert {leaf: list(t.shape) for leaf, t in encoded.items()} == {
        leaf: dims for leaf, (dims, _) in shapes.items()
    }
    energies, total = method.energies(W, known(shape), [sizes], pattern="2:4")
    assert found.loss == pytest.approx(found.energy / total, rel=1e-9)
    # The one size of a pruned matrix is solved for good; dictionaries take fewer rounds.
    assert energies[0] == pytest.approx(found.energy, rel=1e-9 if name in PRUNING else 0.2)


def test_a_plan_keeps_the_pattern_through_json_and_drops_it_with_the_form() -> None:
    m = unit("sparse", (8, 12)).at({"nonzeros": 48}).first
    (again,) = read_matrices([record_of(m)])
    assert again == m
    assert m.dense().pattern is None
    record = record_of(m)
    del record["pattern"]  # as an earlier version wrote it
    assert read_matrices([record])[0].pattern is None


SPARSE = {"form": "sparse", "nonzeros": 48, "d_in": 12, "pattern": "2:4"}
DICTIONARY = {"form": "dictionary", "atoms": 8, "nonzeros": 4, "pattern": "2:4"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({**SPARSE, "nonzeros": 47}, "needs nonzeros 48 for [8, 12], got 47"),
        ({**DICTIONARY, "nonzeros": 3}, "needs atoms 8 and nonzeros 4 for [8, 12], got 8 and 3"),
        ({**DICTIONARY, "atoms": 7}, "needs atoms 8 and nonzeros 4 for [8, 12], got 7 and 4"),
    ],
)
def test_a_spec_whose_sizes_rule_the_pattern_out_is_refused(
    spec: dict[str, Any], words: str
) -> None:
    model = nn.Module()
    model.layer = nn.Linear(12, 8)
    check_modules({"layer": spec}, "config.json")
    with pytest.raises(CheckpointError) as caught:
        swap_in_forms(model, {"layer": spec})
    assert str(caught.value) == (
        f"config.json: quantization_config.modules['layer']: pattern 2:4 {words}; the config was "
        "edited, or is another model's"
    )


def test_specs_that_hold_to_the_pattern_are_taken() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(12, 8), nn.Linear(12, 8)
    modules = {"one": SPARSE, "two": DICTIONARY}
    check_modules(modules, "config.json")
    assert swap_in_forms(model, modules).keys() >= {"one.mask", "two.mask"}


@pytest.mark.parametrize("pattern", ["1:4", 24, True, ["2:4"]])
def test_unknown_patterns_are_refused(pattern: Any) -> None:
    with pytest.raises(CheckpointError, match="must hold no 'pattern' but '2:4', got"):
        check_modules({"layer": {**SPARSE, "pattern": pattern}}, "config.json")


def test_products_have_no_pattern() -> None:
    spec = {"form": "low_rank", "rank": 2, "pattern": "2:4"}
    with pytest.raises(CheckpointError, match="must hold no 'pattern', got"):
        check_modules({"layer": spec}, "config.json")


@pytest.mark.parametrize(
    ("form", "sizes", "words"),
    [
        ("sparse", {"nonzeros": 40}, "pattern 2:4 needs nonzeros 48 for [8, 12], got 40"),
        (
            "dictionary",
            {"atoms": 6, "nonzeros": 3},
            "pattern 2:4 needs atoms 8 and nonzeros 4 for [8, 12], got 6 and 3",
        ),
        (
            "dictionary",
            {"atoms": 12, "nonzeros": 6},
            "pattern 2:4 needs atoms 8 and nonzeros 4 for [8, 12], got 12 and 6",
        ),
    ],
)
def test_a_given_plan_cannot_leave_the_pattern(form: str, sizes: Any, words: str) -> None:
    problems: list[str] = []
    given = GivenPlan("plan.json", "", {"m": Entry((8, 12), form, sizes, None)})
    apply_given(given, [unit(form, (8, 12), method=form)], problems)
    assert problems == [f"plan.json, m: {words}; correct it, or make it dense"]


def test_a_given_plan_that_holds_to_the_pattern_keeps_it() -> None:
    problems: list[str] = []
    given = GivenPlan("plan.json", "", {"m": Entry((8, 12), "sparse", {"nonzeros": 48}, None)})
    (decided,) = apply_given(given, [unit("sparse", (8, 12))], problems)
    assert problems == []
    assert (decided.first.pattern, decided.sizes) == ("2:4", {"nonzeros": 48})
