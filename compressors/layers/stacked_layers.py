"""Equal layers whose tensors are stacked, for products of a batch with one layer for each element.

The tensors remain parameters and buffers of their layers, as views of one common tensor. This takes
no additional memory, and leaves names, files and training in place as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.compressed_linear import CompressedLinear
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.layers.packing import dequantize, unpack_integers
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank

TYPES = (Dense.TYPE, LowRank.TYPE, PivotedLowRank.TYPE)
"""Components that can be stacked. Others have tensors of a different size in every layer, such as
the values of a mask, or no product of several matrices."""
STORED = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "order", "bias")
"""Names of the tensors that are stacked; the others are sentinels and shapes."""


def form_of(layer: nn.Module) -> str | None:
    """Return what layers must have in common to be stacked; None if they cannot be."""
    if type(layer) is nn.Linear:
        return f"{[*layer.weight.shape]}, bias={layer.bias is not None}"
    if type(layer) is not CompressedLinear or len(layer.config.components) != 1:
        return None
    (component,) = layer.config.components
    # Layers of an elastic model can use a part of their rank, which changes during training.
    if component.type not in TYPES or component.shares is not None or component.ranks:
        return None
    return f"{layer.config}, bias={layer.bias is not None}"


class StackedLayers:
    """Layers of one form, see `form_of`, with which the elements of a batch are multiplied.

    Parameters
    ----------
    layers : sequence of nn.Module
    owners : sequence of nn.Module
        Modules that call the layers; `unchanged` checks them, too.
    """

    def __init__(self, layers: Sequence[nn.Module], owners: Sequence[nn.Module] = ()) -> None:
        self.layers: tuple[Any, ...] = tuple(layers)
        self._stacked: dict[str, nn.Parameter] = {}
        self._parts: list[Tensor] = []
        self._addresses: list[int] = []
        self._modules = [*owners, *(module for layer in layers for module in layer.modules())]
        self._children = [
            (module._modules, name, child)
            for module in self._modules
            for name, child in module._modules.items()
        ]
        self._hooks: list[Any] = [
            hooks
            for module in self._modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def stack(self) -> bool:
        """Move the tensors of all layers into common ones; return whether that was possible."""
        self._stacked, self._parts, self._addresses = {}, [], []
        named = [dict(_tensors(layer)) for layer in self.layers]
        alike = {str([(n, t.shape, t.dtype, t.device) for n, t in each.items()]) for each in named}
        if len(alike) > 1 or any(tensor.is_meta for tensor in named[0].values()):
            return False
        if any(getattr(module, "_copy", None) for module in self._modules):
            return False  # a fast path has converted the stored integers
        # Not inference tensors, which could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            for name in named[0]:
                parts = [each[name] for each in named]
                whole = torch.stack([part.detach() for part in parts])  # [n_layers, ...]
                for part, view in zip(parts, whole, strict=True):
                    part.data = view
                # Not a plain tensor, which a CUDA graph would copy for every call.
                self._stacked[name] = nn.Parameter(whole, requires_grad=False)
                self._parts += parts
        self._addresses = [part.data_ptr() for part in self._parts]
        return True

    @property
    def unchanged(self) -> bool:
        """Whether the layers are as they were when they were stacked, without hooks or adapters."""
        if torch.compiler.is_compiling():
            return True
        # These run for every token: hundreds of comparisons take microseconds this way.
        if any(self._hooks):
            return False
        if not all([children[name] is child for children, name, child in self._children]):
            return False
        # Conversions replace the data of a parameter.
        return [part.data_ptr() for part in self._parts] == self._addresses

    @property
    def like(self) -> Tensor:
        """A floating-point tensor of the stack, in whose dtype products are computed."""
        return next(t for t in self._stacked.values() if t.is_floating_point())

    @property
    def numbers(self) -> int:
        """Entries of the matrix of one layer."""
        return int(self.layers[0].out_features * self.layers[0].in_features)

    def multiply(self, x: Tensor, ids: Tensor) -> Tensor:
        """Map ``x`` [n, m, d_in] to [n, m, d_out], element i with layer ``ids[i]``."""
        layer = self.layers[0]
        if type(layer) is nn.Linear:
            y = self._factor(x, layer, "", ids)
        else:
            (kind,) = (component.type for component in layer.config.components)
            y = self._component(x, layer._modules[kind], f"{kind}.", ids)
        bias = self._stacked.get("bias")
        return y if bias is None else y + bias.index_select(0, ids)[:, None]

    def _component(self, x: Tensor, component: Any, prefix: str, ids: Tensor) -> Tensor:
        if isinstance(component, Dense):
            return self._factor(x, component, prefix, ids)
        p = self._factor(x, component.a, f"{prefix}a.", ids)
        if isinstance(component, LowRank):
            return self._factor(p, component.b, f"{prefix}b.", ids)
        c: nn.Module | None = component._modules.get("c")  # absent if every row is a pivot row
        rest = [] if c is None else [self._factor(p, c, f"{prefix}c.", ids)]
        order = self._stacked[f"{prefix}order"].index_select(0, ids).long()  # [n, d_out]
        places = order[:, None].expand(-1, x.shape[1], -1)
        return torch.cat([p, *rest], dim=-1).gather(-1, places)

    def _factor(self, x: Tensor, module: Any, prefix: str, ids: Tensor) -> Tensor:
        """Multiply ``x`` [n, m, columns] by the matrices of a factor, [n, rows, columns]."""
        tensors = {
            leaf: self._stacked[f"{prefix}{leaf}"].index_select(0, ids)
            for leaf in STORED[:4]
            if f"{prefix}{leaf}" in self._stacked
        }
        if "weight" in tensors:
            return torch.bmm(x, tensors["weight"].mT)
        assert isinstance(module, PackedWeight)
        args, (rows, columns) = module.packed_args, module.packed_shape
        assert args is not None
        codes = unpack_integers(tensors["weight_packed"].flatten(0, 1), args.bits, columns)
        zero = tensors.get("weight_zero_point")  # [n, words, groups]
        if zero is not None:
            flat = zero.mT.flatten(0, 1).contiguous()  # [n * groups, words]
            zero = unpack_integers(flat, args.bits, rows).view(len(ids), -1, rows).mT
        scale = tensors["weight_scale"]  # [n, rows, groups]
        return torch.bmm(x, dequantize(codes.view(len(ids), rows, columns), scale, zero).mT)


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layer that are stacked, by their names within it."""
    for prefix, module in layer.named_modules():
        if isinstance(module, CompressedLinear):
            yield from ((name, t) for name, t in module._parameters.items() if t is not None)
            continue
        for name in STORED:
            tensor = module._parameters.get(name)
            tensor = module._buffers.get(name) if tensor is None else tensor
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor
