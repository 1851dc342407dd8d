"""The Triton kernels for packed integers, on a GPU or with ``TRITON_INTERPRET=1``."""

import os

import pytest
import torch

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import encode_matrix

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from lrc.compressors.kernels import packed_linear_triton as kernels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SCHEMES = [
    "int2-g32",
    "int2-asymmetric",
    "int3",
    "int3-g32",
    "int3-g32-asymmetric",
    "int3-g20",
    "int4",
    "int4-g32",
    "int4-g20-asymmetric",
    "int5-g32",
    "int6-asymmetric",
    "int7",
    "int8",
    "int8-g32-asymmetric",
]
PRODUCTS = {
    "vector": (kernels.vector_product, (1, 3)),
    "tile": (kernels.tile_product, (5, 17)),
    "matrix": (kernels.matrix_product, (17,)),
}


def packed(scheme: str, d_out: int, d_in: int, dtype: torch.dtype) -> PackedLinear:
    args = QuantizationArgs.parse(scheme)
    generator = torch.Generator().manual_seed(d_out)
    shape = d_out, args.groups(d_in)
    codes = torch.randint(args.lowest, args.highest + 1, (d_out, d_in), generator=generator)
    scale = torch.rand(shape, generator=generator).add(0.5).to(dtype)
    zero = torch.randint(args.lowest, args.highest + 1, shape, generator=generator)
    module = PackedLinear(d_in, d_out, args, dtype=dtype).requires_grad_(False)
    zero = None if args.symmetric else zero
    module.load_state_dict(encode_matrix("weight", codes, scale, zero, args))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_kernel_differs_from_the_plain_product_by_rounding(scheme, kind, dtype):
    if INTERPRETED and kind == "tile" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers as integers")
    multiply, rows = PRODUCTS[kind]
    shapes = ((37, 160),) if "g" in scheme else ((37, 160), (5, 77))
    for d_out, d_in in shapes:
        module = packed(scheme, d_out, d_in, dtype).to(DEVICE)
        scale, zero = module.weight_scale, module.zero_points()
        steps = module.codes().double().unflatten(1, (scale.shape[1], -1))
        steps = steps if zero is None else steps - zero.double()[:, :, None]
        matrix = (steps * scale.double()[:, :, None]).flatten(1)
        for count in rows:
            x = torch.randn(count, d_in, generator=torch.Generator().manual_seed(count))
            x = (x + 0.5).to(DEVICE, dtype)
            exact = x.double() @ matrix.T
            plain = (torch.nn.functional.linear(x, module.weight).double() - exact).abs().max()
            stored = module._buffers.get("weight_zero_point")
            y = multiply(x, module.weight_packed, scale, stored, module.args.bits)
            error = (y.double() - exact).abs().max()
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            # Sums are float32 in another order than those of the plain product.
            order = torch.finfo(torch.float32).eps * (x.double().abs() @ matrix.abs().T).max()
            assert error <= 2 * max(plain, rounding) + order
