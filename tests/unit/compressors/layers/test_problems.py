"""Damaged tensors that shapes and types do not show: masks, orders, indices and scales."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.checkpoint.tensor_checks import check_values
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    CompressedLinear,
    QuantizationArgs,
    WeightConfig,
)
from lrc.compressors.layers.bitmask import pack_bits
from lrc.configs.errors import CheckpointError

D_OUT, D_IN = 6, 44
EIGHTS = 40  # the width of what is stored in groups of eight
# Sizes, quantization where it is required, and tensors without which a component is inconsistent.
EXAMPLES: dict[str, tuple[str, dict[str, int], str | None]] = {
    "dense": ("dense", {}, "int4-g4"),
    "low_rank": ("low_rank", {"rank": 4}, None),
    "pivoted_low_rank": ("pivoted_low_rank", {"rank": 4}, None),
    "sparse": ("sparse", {"nonzeros": 3 * D_OUT}, None),
    "semi_structured": ("semi_structured", {"n": 3}, None),
    "block_sparse": ("block_sparse", {"groups": 2 * D_OUT}, "int4-g4"),
    "dictionary with a mask": ("dictionary", {"atoms": 12, "nonzeros": 4}, None),
    "dictionary with indices": ("dictionary", {"atoms": 44, "nonzeros": 2}, None),
    "tensor_train": ("tensor_train", {"bond": 4}, None),
}
PATTERNS = {"tensor_train": "3x2,4x11"}


def columns_of(n: int, *columns: int) -> Tensor:
    """Return the packed mask [D_OUT, n] with these columns set."""
    mask = torch.zeros(D_OUT, n, dtype=torch.bool)
    mask[:, list(columns)] = True
    return pack_bits(mask)


CONSISTENT: dict[str, tuple[str, Tensor]] = {
    "pivoted_low_rank": ("order", torch.tensor([3, 0, 5, 1, 2, 4], dtype=torch.int16)),
    "sparse": ("mask", columns_of(D_IN, 0, 7, 43)),
    "semi_structured": (
        "mask",
        columns_of(EIGHTS, *(8 * group + i for group in range(5) for i in (0, 3, 7))),
    ),
    "block_sparse": ("mask", columns_of(D_IN // 4, 0, 10)),
    "dictionary with a mask": ("mask", columns_of(12, 0, 3, 8, 11)),
    "dictionary with indices": ("index", torch.tensor([[0, 43]] * D_OUT, dtype=torch.int16)),
}


def loaded(name: str, quantization: str | None = None) -> tuple[nn.Module, CompressedLinear]:
    """Return a model with one consistent layer, and that layer."""
    kind, sizes, required = EXAMPLES[name]
    written = quantization or required
    args = None if written is None else QuantizationArgs.parse(written)
    model = nn.Module()
    d_in = EIGHTS if kind == "semi_structured" else D_IN
    model.proj = nn.Linear(d_in, D_OUT, bias=False)
    config = WeightConfig((D_OUT, d_in), (ComponentConfig(kind, sizes, args, PATTERNS.get(kind)),))
    replace_layers(model, {"proj": config})
    layer: CompressedLinear = model.proj
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        for buffer in layer.buffers():
            buffer.zero_()
        for part, spec in COMPONENTS[kind].tensors(D_OUT, d_in, config.components[0]).items():
            if f"{kind}.{part}_shape" in dict(layer.named_buffers()):
                layer.get_buffer(f"{kind}.{part}_shape").copy_(torch.tensor(spec.shape))
    if name in CONSISTENT:
        leaf, tensor = CONSISTENT[name]
        layer.get_buffer(f"{kind}.{leaf}").copy_(tensor)
    return model, layer


def test_every_component_is_covered() -> None:
    assert {kind for kind, *_ in EXAMPLES.values()} == COMPONENTS.keys()
    assert "index" in loaded("dictionary with indices")[1].dictionary.state_dict()
    assert "mask" in loaded("dictionary with a mask")[1].dictionary.state_dict()


@pytest.mark.parametrize("quantization", [None, "int4-g4"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_consistent_tensors_have_no_problems(name: str, quantization: str | None) -> None:
    if name == "dictionary with indices" and quantization:
        quantization = "int4"  # rows of two values
    model, layer = loaded(name, quantization)
    assert layer.problems() == []
    check_values(model)


def set_bit(row: int, column: int, value: bool) -> Callable[[Tensor], None]:
    def change(mask: Tensor) -> None:
        bit = 1 << (column % 8)
        byte = int(mask[row, column // 8])
        mask[row, column // 8] = byte | bit if value else byte & ~bit

    return change


def moved(mask: Tensor) -> None:
    """Move a bit from one row to another."""
    set_bit(0, 0, False)(mask)
    set_bit(1, 1, True)(mask)


def moved_within(mask: Tensor) -> None:
    """Move a bit from one group of eight to the next one of the same row."""
    set_bit(4, 3, False)(mask)
    set_bit(4, 9, True)(mask)


def entries(*values: int) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[: len(values)] = torch.tensor(values, dtype=tensor.dtype)

    return change


def index_row(*values: int) -> Callable[[Tensor], None]:
    def change(index: Tensor) -> None:
        index[2] = torch.tensor(values, dtype=index.dtype)

    return change


ORDER = "order is not a permutation of the rows"
INDEX = "index is not ascending in [0, 44)"
DAMAGE: list[tuple[str, Callable[[Tensor], None], str]] = [
    ("pivoted_low_rank", entries(0), ORDER),  # twice
    ("pivoted_low_rank", entries(6), ORDER),
    ("pivoted_low_rank", entries(-1), ORDER),
    ("sparse", set_bit(0, 0, False), "the mask has 17 bits set, expected 18"),
    ("sparse", set_bit(5, 20, True), "the mask has 19 bits set, expected 18"),
    ("sparse", set_bit(0, 44, True), "the mask has bits set after column 44"),
    ("semi_structured", set_bit(0, 0, False), "the mask has 89 bits set, expected 90"),
    ("semi_structured", set_bit(5, 20, True), "the mask has 91 bits set, expected 90"),
    ("semi_structured", moved, "the mask does not have 3 bits in every 8 columns"),
    ("semi_structured", moved_within, "the mask does not have 3 bits in every 8 columns"),
    ("block_sparse", set_bit(0, 0, False), "the mask has 11 bits set, expected 12"),
    ("block_sparse", set_bit(3, 9, True), "the mask has 13 bits set, expected 12"),
    ("block_sparse", set_bit(3, 11, True), "the mask has bits set after column 11"),
    ("dictionary with a mask", set_bit(0, 3, False), "the mask has 23 bits set, expected 24"),
    ("dictionary with a mask", set_bit(0, 4, True), "the mask has 25 bits set, expected 24"),
    ("dictionary with a mask", set_bit(5, 15, True), "the mask has bits set after column 12"),
    ("dictionary with a mask", moved, "the mask does not have 4 bits in every row"),
    ("dictionary with indices", index_row(0, 44), INDEX),
    ("dictionary with indices", index_row(-1, 3), INDEX),
    ("dictionary with indices", index_row(3, 3), INDEX),  # one atom twice
    ("dictionary with indices", index_row(4, 3), INDEX),
]


@pytest.mark.parametrize(("name", "damage", "problem"), DAMAGE)
def test_damaged_masks_orders_and_indices_are_reported(
    name: str, damage: Callable[[Tensor], None], problem: str
) -> None:
    model, layer = loaded(name)
    kind, (leaf, _) = EXAMPLES[name][0], CONSISTENT[name]
    damage(layer.get_buffer(f"{kind}.{leaf}"))
    assert layer.problems() == [f"{kind}: {problem}"]
    with pytest.raises(CheckpointError, match=rf"damaged: proj\.{kind}: ") as caught:
        check_values(model)
    assert problem in str(caught.value)
    assert caught.value.code == "damaged-weights"


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", EXAMPLES)
def test_numbers_that_are_not_finite_are_reported(name: str, number: float) -> None:
    for quantization in (None, "int4" if name == "dictionary with indices" else "int4-g4"):
        kind = EXAMPLES[name][0]
        names = [n for n, _ in loaded(name, quantization)[1].named_parameters()]
        assert names
        for tensor in names:
            model, layer = loaded(name, quantization)
            with torch.no_grad():
                layer.get_parameter(tensor).view(-1)[-1] = number
            leaf = tensor.removeprefix(f"{kind}.")
            assert layer.problems() == [f"{kind}: {leaf} is not finite in float32"]
            with pytest.raises(CheckpointError) as caught:
                check_values(model)
            assert caught.value.code == "damaged-weights"


@pytest.mark.parametrize("name", EXAMPLES)
def test_scales_of_zero_are_reported(name: str) -> None:
    quantization = "int4" if name == "dictionary with indices" else "int4-g4"
    kind = EXAMPLES[name][0]
    scales = [n for n, _ in loaded(name, quantization)[1].named_parameters() if "_scale" in n]
    assert scales
    for scale in scales:
        _, layer = loaded(name, quantization)
        with torch.no_grad():
            layer.get_parameter(scale).view(-1)[0] = 0
        assert layer.problems() == [f"{kind}: {scale.removeprefix(f'{kind}.')} contains zeros"]
        # The smallest scales of bfloat16 become zero where a model is loaded in float16.
        assert layer.half().problems() == []


def test_stored_shapes_sentinels_and_biases_are_checked() -> None:
    _, layer = loaded("low_rank", "int4-g4")
    layer.low_rank.a.weight_shape[1] = 45
    layer.weight.fill_(1)
    layer.bias = nn.Parameter(torch.tensor([0.0, torch.nan]))
    assert layer.problems() == [
        "low_rank: a.weight_shape must be [4, 44], got [4, 45]",
        "weight must be the sentinel 0",
        "bias is not finite in float32",
    ]


def test_masks_must_have_the_pattern() -> None:
    sparse = WeightConfig((4, 8), (ComponentConfig("sparse", {"nonzeros": 16}, pattern="2:4"),))
    sizes = {"atoms": 4, "nonzeros": 2}
    dictionary = WeightConfig((4, 8), (ComponentConfig("dictionary", sizes, pattern="2:4"),))
    for config, columns in ((sparse, 8), (dictionary, 4)):
        (component,) = CompressedLinear(config).components
        mask = torch.zeros(4, columns, dtype=torch.bool)
        mask[:, [i for i in range(columns) if i % 4 in (0, 3)]] = True
        with torch.no_grad():
            for parameter in component.parameters():
                parameter.fill_(1)
            component.mask.copy_(pack_bits(mask))
            assert component.problems() == []
            mask[0, 0], mask[1, 1] = False, True
            component.mask.copy_(pack_bits(mask))
        assert component.problems() == ["the mask does not have 2 bits in every 4 columns"]


def test_layers_that_are_not_compressed_must_be_finite_too() -> None:
    model, _ = loaded("low_rank")
    model.norm = nn.LayerNorm(D_OUT)
    check_values(model)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"norm\.weight is not finite") as caught:
        check_values(model)
    assert caught.value.code == "damaged-weights"


def test_all_problems_of_a_sum_are_reported() -> None:
    args = QuantizationArgs.parse("int4-g4")
    components = (
        ComponentConfig("sparse", {"nonzeros": 5}, args),
        ComponentConfig("dense", {}, args),
    )
    layer = CompressedLinear(WeightConfig((D_OUT, D_IN), components))
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.zero_()
        layer.dense.weight_scale[0] = torch.nan
    assert layer.problems() == [
        "sparse: values_scale contains zeros",
        "sparse: the mask has 0 bits set, expected 5",
        "dense: weight_scale is not finite in float32",
        "dense: weight_scale contains zeros",
        "dense: weight_shape must be [6, 44], got [0, 0]",
    ]


def test_a_long_list_of_damaged_layers_is_cut() -> None:
    model = nn.ModuleDict({f"proj_{i}": nn.Linear(D_IN, D_OUT, bias=False) for i in range(7)})
    config = WeightConfig((D_OUT, D_IN), (ComponentConfig("sparse", {"nonzeros": 5}),))
    replace_layers(model, dict.fromkeys(model, config))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()  # nothing may depend on memory that was never written
    with pytest.raises(CheckpointError, match=r"proj_0.*proj_4.*\(and 2 more\)"):
        check_values(model)
    model.to("meta")
    check_values(model)  # tensors that are not in memory are not checked
