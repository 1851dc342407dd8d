"""Layers with random contents in their stored form, to be timed."""

from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.latency.latency_table import Product
from lrc.compressors.layers import CompressedLinear, QuantizationArgs, WeightConfig
from lrc.compressors.layers.bitmask import BYTE, pack_bits
from lrc.compressors.layers.component import Component
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.layers.packing import repack_integers


@torch.no_grad()
def random_layer(product: Product, *, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """Return the layer that a loaded model has for a product, without a fast path yet.

    It is on the device of the generator.
    """
    d_out, d_in = product.shape
    device = generator.device
    if product.component is None:
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear, d_in, d_out, bias=False, device=device, dtype=dtype
        )
        linear.weight.normal_(generator=generator)
        return linear.requires_grad_(False)
    config = WeightConfig(product.shape, (product.component,))
    layer = CompressedLinear(config, device=device, dtype=dtype).eval().requires_grad_(False)
    for component in layer.components:
        for module in component.modules():
            _fill(module, component, generator)
    return layer


def _fill(module: nn.Module, component: Component, generator: torch.Generator) -> None:
    """Overwrite the tensors of a component, or of one of its factors."""
    args = component.config.quantization
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("_scale"):  # integers times scales are about as large as other weights
            parameter.uniform_(0.005, 0.015, generator=generator)
        else:
            parameter.normal_(std=0.1, generator=generator)
    for name, tensor in module.named_buffers(recurse=False):
        if name.endswith("_shape"):
            assert isinstance(module, PackedWeight)
            tensor.copy_(torch.tensor(module.packed_shape))
        elif name.endswith("_packed"):
            assert args is not None
            tensor.copy_(_packed(tensor, module, component, args, generator))
        elif name.endswith("_zero_point"):
            tensor.zero_()
        elif name == "mask":
            tensor.copy_(_mask(tensor, component, generator))
        elif name == "order":
            tensor.copy_(_order(len(tensor), component.config.sizes["rank"], generator))
        elif name == "index":
            atoms = component.config.sizes["atoms"]
            keys = torch.rand(len(tensor), atoms, **_where(generator))
            tensor.copy_(keys.argsort(1)[:, : tensor.shape[1]].sort(1).values)
        else:
            raise ValueError(f"{component.TYPE} has a tensor {name!r} of unknown content")


def _order(d_out: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return where rows are, if random ones are pivots; both parts are ascending, as in files."""
    rows = torch.randperm(d_out, **_where(generator))
    rows = torch.cat([rows[:rank].sort().values, rows[rank:].sort().values])
    return torch.empty_like(rows).index_copy_(0, rows, torch.arange(d_out, device=rows.device))


def _packed(
    tensor: Tensor,
    module: nn.Module,
    component: Component,
    args: QuantizationArgs,
    generator: torch.Generator,
) -> Tensor:
    """Return random packed integers; the bits after the last one of a row are zero."""
    if isinstance(module, PackedWeight):
        rows, columns = module.packed_shape
    else:
        specs = component.tensors(component.d_out, component.d_in, component.config)
        rows, columns = 1, torch.Size(specs["values"].shape).numel()
    shape = (rows, columns)
    codes = torch.randint(args.lowest, args.highest + 1, shape, **_where(generator))
    return repack_integers(codes.to(torch.int8), args.bits)


def _mask(packed: Tensor, component: Component, generator: torch.Generator) -> Tensor:
    """Return a packed mask with as many bits as there are values, at random places."""
    sizes, d_out, d_in = component.config.sizes, component.d_out, component.d_in
    if component.config.pattern == "2:4":
        columns = sizes.get("atoms", d_in)
        return pack_bits(_choose(len(packed) * columns // 4, 4, 2, generator).view(-1, columns))
    if component.TYPE == "semi_structured":
        return pack_bits(_choose(packed.numel(), BYTE, sizes["n"], generator).view(d_out, -1))
    if component.TYPE == "dictionary":
        return pack_bits(_choose(d_out, sizes["atoms"], sizes["nonzeros"], generator))
    columns, count = d_in, sizes.get("nonzeros", 0)
    if component.TYPE == "block_sparse":
        assert component.config.quantization is not None
        columns, count = component.config.quantization.groups(d_in), sizes["groups"]
    return pack_bits(_choose(1, d_out * columns, count, generator).view(d_out, columns))


def _choose(groups: int, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return a mask [groups, size] with `count` random entries in every row."""
    if groups == 1:
        chosen = torch.randperm(size, **_where(generator))[None, :count]
    else:
        chosen = torch.rand(groups, size, **_where(generator)).argsort(1)[:, :count]
    zeros = torch.zeros(groups, size, dtype=torch.bool, device=generator.device)
    return zeros.scatter_(1, chosen, True)


def _where(generator: torch.Generator) -> dict[str, Any]:
    return {"generator": generator, "device": generator.device}
