"""Layers with random contents in their stored form, to be timed."""

import torch
from torch import Tensor, nn

from lrc.compressors.latency.latency_table import Product
from lrc.compressors.layers import CompressedLinear, QuantizationArgs, WeightConfig
from lrc.compressors.layers.bitmask import BYTE, pack_bits
from lrc.compressors.layers.component import Component
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.layers.packing import pack_integers


@torch.no_grad()
def random_layer(
    product: Product, *, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> nn.Module:
    """Return the layer that a loaded model has for a product, without a fast path yet.

    Parameters
    ----------
    generator : torch.Generator
        Of the CPU.
    """
    d_out, d_in = product.shape
    if product.component is None:
        linear: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False, dtype=dtype)
        linear.weight.copy_(torch.randn(d_out, d_in, generator=generator))
        return linear.requires_grad_(False).to(device)
    layer = CompressedLinear(WeightConfig(product.shape, (product.component,)), dtype=dtype)
    layer.eval().requires_grad_(False)
    for component in layer.components:
        for module in component.modules():
            _fill(module, component, generator)
    return layer.to(device)


def _fill(module: nn.Module, component: Component, generator: torch.Generator) -> None:
    """Overwrite the tensors of a component, or of one of its factors."""
    args = component.config.quantization
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("_scale"):  # integers times scales are about as large as other weights
            parameter.copy_(torch.rand(parameter.shape, generator=generator).add_(0.5).div_(100))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
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
            tensor.copy_(torch.randperm(len(tensor), generator=generator))
        elif name == "index":
            atoms = component.config.sizes["atoms"]
            keys = torch.rand(len(tensor), atoms, generator=generator)
            tensor.copy_(keys.argsort(1)[:, : tensor.shape[1]].sort(1).values)
        else:
            raise ValueError(f"{component.TYPE} has a tensor {name!r} of unknown content")


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
    codes = torch.randint(args.lowest, args.highest + 1, shape, generator=generator)
    return pack_integers(codes, args.bits)


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
        chosen = torch.randperm(size, generator=generator)[None, :count]
    else:
        chosen = torch.rand(groups, size, generator=generator).argsort(1)[:, :count]
    return torch.zeros(groups, size, dtype=torch.bool).scatter_(1, chosen, True)
