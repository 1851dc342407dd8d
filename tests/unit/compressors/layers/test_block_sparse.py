"""The form of group-sparse integers: what it stores, computes and refuses, and who plans it."""

from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc.compressors.checkpoint.format import check_modules
from lrc.compressors.checkpoint.quantizer import swap_in_forms
from lrc.compressors.layers import GroupSparse, Scheme
from lrc.compressors.planning.plan import Matrix, read_matrices, record_of
from lrc.compressors.solvers.quantize_blocks import QuantizedBlocks
from lrc.configs.errors import CheckpointError

D_OUT, D_IN = 12, 88  # 11 groups of 8 a row: no whole number of bytes of the mask


def spec(groups: int, scheme: str, **more: Any) -> dict[str, Any]:
    return {
        "form": "group_sparse",
        "groups": groups,
        "scheme": scheme,
        "shape": [D_OUT, D_IN],
        **more,
    }


def example(groups: int, scheme: Scheme) -> QuantizedBlocks:
    """Draw codes over the whole range, and which groups they are."""
    generator = torch.Generator().manual_seed(0)
    assert scheme.group_size is not None
    a_row = scheme.groups(D_IN)
    order = torch.randperm(D_OUT * a_row, generator=generator)
    mask = (order < groups).view(D_OUT, a_row)
    size = (groups, scheme.group_size)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, size, generator=generator)
    scale = torch.randn(groups, generator=generator).bfloat16()
    return QuantizedBlocks(codes.to(torch.int8), scale, mask, scheme)


def layer_of(found: QuantizedBlocks, *, bias: bool = False) -> GroupSparse:
    model = nn.Module()
    model.layer = nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.bfloat16)
    table = {"layer": spec(len(found.codes), str(found.scheme))}
    check_modules(table, "config.json")
    swap_in_forms(model, table)
    state = {f"layer.{leaf}": tensor for leaf, tensor in found.encode().items()}
    if bias:
        state["layer.bias"] = torch.arange(D_OUT).bfloat16()
    model.load_state_dict(state)
    layer: GroupSparse = model.layer
    return layer


@pytest.mark.parametrize("written", ["int4-g8", "int3-g8", "int2-g22", "int8-g88", "int5-g1"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_counted_bits_are_those_of_the_file(written: str, share: float, tmp_path: Path) -> None:
    scheme = Scheme.read(written)
    a_row = scheme.groups(D_IN)
    groups = max(int(share * D_OUT * a_row), 1)
    layer = layer_of(example(groups, scheme))
    save_file(layer.state_dict(), tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    n_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")  # but for the header
    counted = GroupSparse.stored_bits(D_OUT, D_IN, bits=16, scheme=written, groups=groups)
    numbers = groups * (scheme.group_size or 0)
    by_hand = 32 * ceil(numbers * scheme.bits / 32) + 16 * groups + 8 * D_OUT * ceil(a_row / 8) + 8
    assert n_bytes * 8 == counted == by_hand
    assert GroupSparse.parameters_stored(D_OUT, D_IN, scheme=written, groups=groups) == numbers
    declared = GroupSparse.stored(D_OUT, D_IN, spec(groups, written), bias=False)
    assert {name: ([*t.shape], t.dtype) for name, t in layer.state_dict().items()} == {
        name: (shape, kind or torch.bfloat16) for name, (shape, kind) in declared.items()
    }


@pytest.mark.parametrize("written", ["int4-g8", "int3-g22"])
@pytest.mark.parametrize("bias", [False, True])
def test_computes_the_product_and_becomes_dense(written: str, bias: bool) -> None:
    found = example(30, Scheme.read(written))
    layer = layer_of(found, bias=bias)
    assert torch.equal(layer.product(), found.weight().bfloat16().float())
    x = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = nn.functional.linear(x, found.weight().bfloat16(), layer.bias)
    assert torch.equal(layer(x), expected)
    dense = layer.dense()
    assert type(dense) is nn.Linear
    assert torch.equal(dense(x), expected)
    layer(x).float().square().sum().backward()
    assert layer.weight_scale.grad is not None
    assert bool(layer.weight_scale.grad.all())


def test_the_whole_is_compiled_as_one_graph() -> None:
    layer = layer_of(example(30, Scheme.read("int4-g8")))
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.ones(2, D_IN).bfloat16()
    assert torch.equal(graph(x), layer(x))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no scheme": ({"scheme": None}, "must hold a 'scheme'"),
    "no groups": ({"groups": 0}, "must hold 'groups': N >= 1"),
    "no shape": ({"shape": None}, r"must hold 'shape': \[d_out, d_in\] with a 'scheme'"),
    "no scheme at all": ({"scheme": "x"}, "has a 'scheme' that must be written like"),
    "ungrouped": ({"scheme": "int4"}, "has a 'scheme' that must be written like int4-g16, symm"),
    "zero points": ({"scheme": "int4-g8-asymmetric"}, "got 'int4-g8-asymmetric'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_specs_are_refused_in_words(case: str) -> None:
    change, words = WRONG[case]
    with pytest.raises(CheckpointError, match=rf"modules\['layer'\] .*{words}"):
        check_modules({"layer": spec(30, "int4-g8") | change}, "config.json")


@pytest.mark.parametrize(
    ("groups", "scheme", "words"),
    [
        (133, "int4-g8", r"groups must be in \[1, 132\] for \[12, 88\], got 133"),
        (3, "int4-g16", "rows of 88 numbers are no multiple of the group size 16"),
    ],
)
def test_sizes_that_no_weight_can_have_are_refused(groups: int, scheme: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GroupSparse.stored(D_OUT, D_IN, spec(groups, scheme), bias=False)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 132), (0.5, 66), (0.25, 99), (0.999, 1)])
def test_a_plan_keeps_the_share_that_is_not_removed(sparsity: float, kept: int) -> None:
    bits = 16 * D_OUT * D_IN
    dense = Matrix("a", 0, (D_OUT, D_IN), 0, "gqsa", "dense", None, bits, bits)
    planned = dense.group_sparse("int4-g8", 0, sparsity)
    assert planned.sizes == {"groups": kept}
    assert planned.bits == planned.stored_bits({"groups": kept})
    assert planned.written == f"{kept} groups"
    assert read_matrices([record_of(planned)]) == [planned]


def test_a_module_reads_only_what_its_mask_says() -> None:
    found = example(1, Scheme.read("int4-g8"))
    product: Tensor = layer_of(found).product()
    assert int((product.view(D_OUT, -1, 8) != 0).any(dim=2).sum()) == 1
