"""Products with dense and integer matrices by the kernels of vLLM."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

from lrc.compressors.integrations.terms import Matrix
from lrc.compressors.layers.packing import repack_integers

KERNEL_BITS = (4, 8)
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""For which vLLM's kernels are used; some accept others and then fail or are wrong."""


class DenseProduct(nn.Module):
    """Multiply by a matrix of numbers as an uncompressed layer of vLLM does."""

    bias = None  # kernels ask for it

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self._method: Any = UnquantizedLinearMethod()
        self._method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = self._method.apply(self, x)
        return y


class IntegerProduct(nn.Module):
    """Multiply by a matrix of integers as vLLM does for compressed-tensors.

    Raises
    ------
    ValueError
        If vLLM has no kernel for the scheme, the shape and the device.
    """

    bias = None

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        args, (rows, columns) = matrix.args, matrix.shape
        assert args is not None
        assert matrix.scale is not None
        if args.bits not in KERNEL_BITS or matrix.scale.dtype not in KERNEL_DTYPES:
            raise ValueError(f"vLLM has no kernel for {args} in {matrix.scale.dtype}")
        self._scheme: Any = CompressedTensorsWNA16(
            "channel" if args.group_size is None else "group",
            args.bits,
            args.group_size,
            args.symmetric,
            layer_name=str(args),
        )
        with matrix.values.device:
            self._scheme.create_weights(
                layer=self,
                output_size=rows,
                input_size=columns,
                output_partition_sizes=[rows],
                input_size_per_partition=columns,
                params_dtype=matrix.scale.dtype,
                weight_loader=None,
            )
        stored = {
            "weight_packed": repack_integers(matrix.values, args.bits),
            "weight_scale": matrix.scale,
            "weight_shape": torch.tensor(matrix.shape),
        }
        if matrix.zero is not None:
            packed = repack_integers(matrix.zero.T.contiguous(), args.bits)
            stored["weight_zero_point"] = packed.T.contiguous()
        for name, tensor in stored.items():
            self.get_parameter(name).data.copy_(tensor)
        self._scheme.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = self._scheme.apply_weights(self, x, None)
        return y


def make_product(matrix: Matrix) -> nn.Module | None:
    """Return the module that multiplies by a matrix, or None if vLLM has no kernel for it."""
    if matrix.args is None:
        return DenseProduct(matrix.values)
    try:
        return IntegerProduct(matrix)
    except ValueError:
        return None
