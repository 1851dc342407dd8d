"""Terms of layers: the same product, whole, fused, or divided among devices."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.integrations.terms import FusedProduct, Matrix, Term, terms_of
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    CompressedLinear,
    WeightConfig,
    sentinel,
)
from lrc.compressors.layers.packing import encode_matrix
from lrc.compressors.layers.quantization_args import QuantizationArgs

D_OUT, D_IN = 24, 32
INT4, ZERO = QuantizationArgs.parse("int4-g8"), QuantizationArgs.parse("int5-g8-asymmetric")


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(name: str, rows: int, columns: int, args: QuantizationArgs) -> dict[str, Tensor]:
    """Return the stored tensors of a random matrix of integers."""
    draw = torch.Generator().manual_seed(rows)
    groups = args.groups(columns)
    codes = torch.randint(args.lowest, args.highest + 1, (rows, columns), generator=draw)
    zero = torch.randint(args.lowest, args.highest + 1, (rows, groups), generator=draw)
    scale = torch.rand(rows, groups, generator=draw) + 0.1
    return encode_matrix(name, codes, scale, None if args.symmetric else zero, args)


def dense(args: QuantizationArgs) -> tuple[ComponentConfig, dict[str, Tensor]]:
    return ComponentConfig("dense", {}, args), integers("dense.weight", D_OUT, D_IN, args)


def encoded(config: ComponentConfig, **parts: Tensor) -> tuple[ComponentConfig, dict[str, Tensor]]:
    tensors = COMPONENTS[config.type].encode(**parts)
    return config, {f"{config.type}.{name}": tensor for name, tensor in tensors.items()}


def low_rank(rank: int) -> tuple[ComponentConfig, dict[str, Tensor]]:
    config = ComponentConfig("low_rank", {"rank": rank})
    return encoded(config, B=numbers(D_OUT, rank), A=numbers(rank, D_IN))


def pivoted(rank: int) -> tuple[ComponentConfig, dict[str, Tensor]]:
    config = ComponentConfig("pivoted_low_rank", {"rank": rank})
    return encoded(config, B=numbers(D_OUT, rank), A=numbers(rank, D_IN))


def integer_factors() -> tuple[ComponentConfig, dict[str, Tensor]]:
    tensors = integers("low_rank.a.weight", 16, D_IN, INT4)
    tensors |= integers("low_rank.b.weight", D_OUT, 16, INT4)
    return ComponentConfig("low_rank", {"rank": 16}, INT4), tensors


def sparse() -> tuple[ComponentConfig, dict[str, Tensor]]:
    mask = numbers(D_OUT, D_IN) > 0.5
    config = ComponentConfig("sparse", {"nonzeros": int(mask.sum())})
    return encoded(config, W_hat=numbers(D_OUT, D_IN) * mask, mask=mask)


FORMS: dict[str, Callable[[], list[tuple[ComponentConfig, dict[str, Tensor]]]]] = {
    "dense": lambda: [dense(INT4)],
    "zero points": lambda: [dense(ZERO)],
    "low rank": lambda: [low_rank(5)],
    "integer factors": lambda: [integer_factors()],
    "pivoted": lambda: [pivoted(7)],
    "all pivots": lambda: [pivoted(D_OUT)],
    "sparse": lambda: [sparse()],
    "correction": lambda: [dense(INT4), low_rank(3)],
    "pivoted and sparse": lambda: [pivoted(4), sparse()],
}


def layer_of(form: str) -> CompressedLinear:
    parts = FORMS[form]()
    layer = CompressedLinear(WeightConfig((D_OUT, D_IN), tuple(config for config, _ in parts)))
    tensors = {name: tensor for _, each in parts for name, tensor in each.items()}
    layer.load_state_dict({**tensors, "weight": sentinel()})
    assert layer.problems() == []
    return layer


class Product(nn.Module):
    """A product in plain PyTorch."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix.dequantized().values)


def all_kernels(matrix: Matrix) -> nn.Module:
    return Product(matrix)


def no_integers(matrix: Matrix) -> nn.Module | None:
    return None if matrix.args is not None else Product(matrix)


def even_rows(matrix: Matrix) -> nn.Module | None:
    return Product(matrix) if matrix.args is None or matrix.shape[0] % 16 == 0 else None


X = numbers(3, 5, D_IN)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [all_kernels, no_integers, even_rows])
@pytest.mark.parametrize("form", FORMS)
def test_one_layer(form, make) -> None:
    layer = layer_of(form)
    terms, expanded = terms_of(layer)
    close(FusedProduct([terms], make)(X), layer(X))
    assert expanded == (["sparse"] if "sparse" in form else [])


@pytest.mark.parametrize("make", [all_kernels, no_integers, even_rows])
def test_fused_layers_of_different_forms(make) -> None:
    layers = [layer_of(form) for form in FORMS]
    product = FusedProduct([terms_of(layer)[0] for layer in layers], make)
    close(product(X), torch.cat([layer(X) for layer in layers], dim=-1))


def test_first_matrices_are_multiplied_together() -> None:
    shapes = []

    def make(matrix: Matrix) -> nn.Module:
        shapes.append(matrix.shape)
        return Product(matrix)

    forms = ("low rank", "dense", "pivoted", "dense")
    FusedProduct([terms_of(layer_of(form))[0] for form in forms], make)
    assert sorted(shapes) == sorted([(2 * D_OUT, D_IN), (5 + 7, D_IN), (D_OUT, 5), (D_OUT - 7, 7)])


def test_integers_without_a_kernel_are_counted() -> None:
    terms = [terms_of(layer_of(form))[0] for form in ("dense", "integer factors", "low rank")]
    assert FusedProduct(terms, no_integers).dequantized == [INT4] * 3
    assert FusedProduct(terms, all_kernels).dequantized == []


@pytest.mark.parametrize("form", FORMS)
def test_rows_on_several_devices_are_the_outputs(form) -> None:
    layer = layer_of(form)
    terms, _ = terms_of(layer)
    parts = [
        FusedProduct([[term.rows(slice(start, start + 8)) for term in terms]], all_kernels)(X)
        for start in range(0, D_OUT, 8)
    ]
    close(torch.cat(parts, dim=-1), layer(X))


@pytest.mark.parametrize("width", [16, 4], ids=["whole groups", "parts of groups"])
@pytest.mark.parametrize("form", FORMS)
def test_columns_on_several_devices_add_up(form, width) -> None:
    layer = layer_of(form)
    terms, _ = terms_of(layer)
    total = torch.zeros(())
    for start in range(0, D_IN, width):
        columns = slice(start, start + width)
        part = FusedProduct([[term.columns(columns) for term in terms]], all_kernels)
        total = total + part(X[..., columns])
    close(total, layer(X))


def test_rows_of_a_pivoted_term_need_no_other_rows() -> None:
    (term,), _ = terms_of(layer_of("pivoted"))
    parts = [term.rows(slice(start, start + 8)) for start in range(0, D_OUT, 8)]
    assert sum(part.second.shape[0] for part in parts if part.second is not None) == D_OUT - 7


def test_a_whole_group_of_columns_stays_integers() -> None:
    (term,), _ = terms_of(layer_of("zero points"))
    assert term.columns(slice(8, 24)).first.args == ZERO
    assert term.columns(slice(4, 24)).first.args is None
    row_scales = Matrix.of(layer_of("dense").components[0])
    whole = QuantizationArgs.parse("int4")
    scale = row_scales.scale
    assert scale is not None
    one_scale = Term(Matrix(row_scales.values, whole, scale[:, :1]))
    assert one_scale.columns(slice(3, 7)).first.args == whole
