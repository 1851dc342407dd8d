"""Fast products with packed integers against the plain product, and what may be done with them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.kernels import optimize
from lrc.compressors.layers import ComponentConfig, QuantizationArgs
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import encode_matrix, pack_integers, repack_integers

X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_x86 = pytest.mark.skipif(not X86, reason="the kernels for CPUs are those of x86")
SCHEMES = [
    f"int{bits}{group}{zero}"
    for bits in range(2, 9)
    for group in ("", "-g32", "-g8")
    for zero in ("", "-asymmetric")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = (1, 3, 17, 70)


def packed(scheme: str, d_out: int, d_in: int, dtype: torch.dtype) -> PackedLinear:
    args = QuantizationArgs.parse(scheme)
    generator = torch.Generator().manual_seed(d_out)
    codes = torch.randint(args.lowest, args.highest + 1, (d_out, d_in), generator=generator)
    groups = args.groups(d_in)
    scale = torch.rand(d_out, groups, generator=generator).add(0.5).to(dtype)
    zero = None
    if not args.symmetric:
        shape = (d_out, groups)
        zero = torch.randint(args.lowest, args.highest + 1, shape, generator=generator)
    module = PackedLinear(d_in, d_out, args, dtype=dtype)
    module.load_state_dict(encode_matrix("weight", codes, scale, zero, args))
    return module.requires_grad_(False)


def exact_product(module: PackedLinear, x: Tensor) -> Tensor:
    scale, zero = module.weight_scale.double(), module.zero_points()
    codes = module.codes().double().unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        codes = codes - zero.double()[:, :, None]
    return x.double() @ (codes * scale[:, :, None]).flatten(1).T


def magnitude(module: PackedLinear, x: Tensor) -> Tensor:
    """Return the largest sum of absolute products."""
    steps = 1 << module.args.bits
    scale = module.weight_scale.double().max()
    return x.double().abs().sum(1).max() * steps * scale


def inputs(rows: int, d_in: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(rows))
    return (x + 0.5).to(dtype)


@needs_x86
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_fast_product_differs_by_rounding(scheme: str, dtype: torch.dtype) -> None:
    odd = [(37, 77), (3, 30), (65, 1)] if "g" not in scheme else []
    for d_out, d_in in ((100, 96), (33, 160), (9001, 32), *odd):
        module = packed(scheme, d_out, d_in, dtype)
        given = {rows: inputs(rows, d_in, dtype) for rows in ROWS}
        products = {rows: exact_product(module, x) for rows, x in given.items()}
        errors = {rows: (module(x).double() - products[rows]).abs() for rows, x in given.items()}
        assert module.optimize() is None
        for rows, x in given.items():
            exact, plain = products[rows], errors[rows].max()
            y = module(x)
            assert y.shape == (rows, d_out)
            assert y.dtype == dtype
            error = (y.double() - exact).abs().max()
            # The plain product may be exact by chance; outputs are rounded at least.
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            # Codes without their offset are up to twice as large, and float32 sums in other orders.
            order = torch.finfo(torch.float32).eps * magnitude(module, x)
            assert error <= 2 * max(plain, rounding) + 2 * order


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 33, 65, 128])
def test_repacking_gives_the_words_of_compressed_tensors(bits: int, columns: int) -> None:
    args = QuantizationArgs(bits)
    codes = torch.randint(args.lowest, args.highest + 1, (5, columns), dtype=torch.int8)
    assert torch.equal(repack_integers(codes, bits), pack_integers(codes, bits))


@needs_x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int2", "int3-g32-asymmetric", "int4-g32", "int8", "int6-g64"])
class TestConvertedCopy:
    def test_stored_tensors_are_released_and_saved(self, scheme, dtype):
        module = packed(scheme, 100, 192, dtype)
        before = module.state_dict()
        module.optimize()
        assert "weight_packed" not in dict(module.named_buffers())
        after = module.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        module.restore()
        assert {*dict(module.named_buffers())} <= {*before}
        assert torch.equal(module.weight_packed, before["weight_packed"])

    def test_copies_and_pickles_are_fast_and_equal(self, scheme, dtype):
        module = packed(scheme, 100, 192, dtype)
        module.optimize()
        x = inputs(3, 192, dtype)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.entry == module.entry
            assert torch.equal(other(x), module(x))
            assert other.state_dict().keys() == module.state_dict().keys()

    def test_loading_replaces_the_converted_copy(self, scheme, dtype):
        module, other = packed(scheme, 100, 192, dtype), packed(scheme, 100, 192, dtype)
        other.weight_scale.mul_(2)
        module.optimize()
        module.load_state_dict(other.state_dict())
        x = inputs(2, 192, dtype)
        other.optimize()
        assert torch.equal(module(x), other(x))

    def test_training_takes_the_plain_product(self, scheme, dtype):
        module = packed(scheme, 100, 192, dtype)
        x = inputs(2, 192, dtype)
        expected = module(x)
        module.optimize()
        module.weight_scale.requires_grad_(True)
        y = module(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert module.weight_scale.grad is not None
        with torch.no_grad():
            module.weight_scale.mul_(2)
            y = module(x)
        torch.testing.assert_close(y, 2 * expected, rtol=0.05, atol=0.05 * float(y.abs().max()))

    def test_other_dtypes_select_again(self, scheme, dtype):
        module = packed(scheme, 100, 192, dtype)
        module.optimize()
        module.half()
        assert module.entry is not None
        x = inputs(2, 192, torch.float16)
        exact = exact_product(module, x)
        assert (module(x).double() - exact).abs().max() <= 2e-3 * exact.abs().max()
        module.to("meta")
        assert module.entry is None
        assert module.reason == "the weights are offloaded"

    @pytest.mark.parametrize("rows", [1, 17, 70])
    def test_compiled_code_has_no_graph_break(self, scheme, dtype, rows):
        module = packed(scheme, 100, 192, dtype)
        module.optimize()
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = inputs(rows, 192, dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))


@needs_x86
def test_operators_are_registered_correctly() -> None:
    for scheme, dtype in (
        ("int4-g32", torch.float32),
        ("int3-g64-asymmetric", torch.float32),
        ("int6-g64-asymmetric", torch.bfloat16),
        ("int8", torch.bfloat16),
    ):
        module = packed(scheme, 100, 192, dtype)
        module.optimize()
        tensors, x = module._copy, inputs(3, 192, dtype)
        operator = getattr(torch.ops.lrc, module.entry.run.__module__.rpartition(".")[2])
        given = [x, tensors["codes"], tensors["scale"]]
        if operator is not torch.ops.lrc.packed_bytes:
            given += [tensors.get("shift"), module.args.bits]
        if operator is torch.ops.lrc.packed_tiles:
            given.append(100)
        torch.library.opcheck(operator.default, given)


@needs_x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "int3-g32-asymmetric", "int6-g32"])
def test_rows_are_looked_up_in_the_converted_copy(scheme: str, dtype: torch.dtype) -> None:
    like = packed(scheme, 100, 96, dtype)
    component = Dense((100, 96), ComponentConfig("dense", {}, like.args), dtype=dtype)
    component.load_state_dict(like.state_dict())
    ids = torch.tensor([[0, 99], [63, 64]])
    expected = component(ids)
    component.optimize()
    assert component.entry is not None
    assert torch.equal(component(ids), expected)
    with pytest.raises((IndexError, RuntimeError)):
        component(torch.tensor([-1]))


def test_small_groups_are_named_as_slow() -> None:
    model = nn.Sequential(packed("int4-g4", 8, 16, torch.float32))
    assert optimize(model).keys() == {"0"}
    assert model[0].reason
