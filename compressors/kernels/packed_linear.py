"""Products with packed integers on CUDA devices, which read the stored tensors as they are."""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from lrc.compressors.kernels.failures import described
from lrc.compressors.kernels.implementations import Entry, Need

OLDEST = (8, 0)
"""Compute capability of the first devices with bfloat16."""


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    from lrc.compressors.kernels import packed_linear_triton as kernels

    with torch.cuda.device(x.device):  # Triton launches on the current device
        return kernels.product(x, packed, scale, zero_point, bits)


@torch.library.custom_op("lrc::packed_linear", mutates_args=(), device_types="cuda")
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return ``x @ W.T`` for a matrix of packed integers.

    Parameters
    ----------
    x : Tensor, shape [rows, columns]
    packed : Tensor, shape [d_out, ceil(columns * bits / 32)], int32
        As `pack_integers` returns them.
    scale : Tensor, shape [d_out, groups]
        In the dtype of `x`.
    zero_point : Tensor, shape [ceil(d_out * bits / 32), groups], int32, or None
        Packed along the rows of the matrix.
    bits : int
        In [2, 8].
    columns : int

    Returns
    -------
    Tensor, shape [rows, d_out]
        In the dtype of `x`; sums are float32.
    """
    return _product(x, packed, scale, zero_point, bits)


@packed_linear.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def run(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Return ``x @ W.T`` like `packed_linear`, without the cost of an operator if not compiled."""
    if torch.compiler.is_compiling():
        y: Tensor = packed_linear(x, packed, scale, zero_point, bits, columns)
        return y
    return _product(x, packed, scale, zero_point, bits)


def refuse(need: Need) -> str | None:
    """Return why the Triton kernels do not serve a product; None if they do."""
    return triton_problem(need.device.index or 0)


@cache
def triton_problem(device: int) -> str | None:
    """Return why Triton cannot be used on a CUDA device, with a remedy; None if a product succeeds.

    What cannot be changed comes first: nobody should install Triton for a GPU that is too old.
    """
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for AMD"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(device), found
        return (
            f"cuda:{device} ({name}) has compute capability {major}.{minor}, and the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]}; use a newer GPU"
        )
    try:
        import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed; `pip install triton`"
        return _broken(error)
    except Exception as error:  # a library that does not fit raises nearly anything
        return _broken(error)
    try:
        x = torch.ones(1, 32, device=f"cuda:{device}", dtype=torch.float16)
        packed = torch.zeros(4, 4, device=x.device, dtype=torch.int32)
        y = _product(x, packed, x.new_ones(4, 1), None, 4)
        expected = x.new_full((1, 4), -8.0 * 32)
        correct = torch.equal(y, expected)
    except Exception as error:
        return (
            f"Triton cannot compile or launch a kernel ({described(error)}); it needs a C compiler "
            "such as gcc, and the version that belongs to this torch: "
            "`pip install --force-reinstall torch triton`"
        )
    return None if correct else f"Triton computes wrong results on cuda:{device}; update it"


def _broken(error: Exception) -> str:
    return (
        f"Triton cannot be imported ({described(error)}); install the version that belongs to this "
        "torch: `pip install --force-reinstall torch triton`"
    )


ENTRIES = [Entry("Triton", "packed_linear", "cuda", range(2, 9), run, refuse=refuse)]
