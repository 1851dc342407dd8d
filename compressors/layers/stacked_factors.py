"""One product for the first factors of linear layers that receive the same input.

A layer with two factors launches two kernels where a dense one launches one, and the first product
of a narrow layer is too small to use the memory bandwidth of a GPU. So the factors of q, k and v,
and those of gate and up, are rows of one tensor: the layer that is called first multiplies by all
of them, the others take their columns of the result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from lrc.compressors.kernels import one_row
from lrc.compressors.layers.shared_input import SharedInput


class StackedFactors(SharedInput):
    """The product of an input with the first factors of several layers.

    The weights of the layers stay separate parameters, whose numbers follow each other in the
    memory of one tensor: this takes no additional memory, and names, files and training in place do
    not change. Every product checks whether the parameters still are in that memory; after a
    conversion or in a copy they are not, and are stacked again. The layers multiply separately
    if a factor has an adapter, a hook, or an offloaded weight.

    Parameters
    ----------
    members : sequence of nn.Module
        Components with an unquantized child ``a``, in any order.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        widths: list[int] = [member.get_submodule("a").out_features for member in members]  # type: ignore[misc]
        stops = [sum(widths[: i + 1]) for i in range(len(widths))]
        self._columns = tuple(zip([0, *stops[:-1]], stops, strict=True))
        self._weight: nn.Parameter | None = None  # [sum of ranks, d_in]
        self._rows: tuple[tuple[nn.Parameter, int], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and files keep: the weights are those of the members."""
        return super().__getstate__() | {"_weight": None, "_rows": ()}

    def _products(self, x: Tensor) -> Sequence[Tensor] | None:
        if not (self._stacked() or self.stack()):
            return None
        weight = self._weight
        # Replicas of a model, on other devices and in other threads, share the group.
        if weight is None or weight.device != x.device:
            return None
        product = one_row.linear(x, weight)  # [..., sum of ranks]
        return [product[..., start:stop] for start, stop in self._columns]

    def stack(self) -> bool:
        """Move the weights into one tensor; return whether that was possible."""
        self._weight, self._rows = None, ()
        modules = [_plain_linear(member) for member in self.members]
        if self._dissolved or torch.compiler.is_compiling() or None in modules:
            return False
        weights: list[Any] = [module.weight for module in modules if module is not None]
        first = weights[0]
        if len({(w.dtype, w.device) for w in weights}) > 1 or not _can_move(first):
            return False
        # Not an inference tensor, which could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([weight.detach() for weight in weights])  # [sum of ranks, d_in]
            for weight, (start, stop) in zip(weights, self._columns, strict=True):
                weight.data = _part(whole, start, stop)
            # Not a plain tensor, which a CUDA graph would copy into its own memory for every call.
            self._weight = nn.Parameter(whole, requires_grad=False)
        self._rows = tuple((weight, weight.data_ptr()) for weight in weights)
        return True

    def follow(self) -> None:
        """Stack again after a member was moved or converted, once all of them have been."""
        super().follow()
        if self._weight is not None and not self._stacked():
            self._weight, self._rows = None, ()
        if self._weight is None:
            self.stack()

    def _stacked(self) -> bool:
        """Whether the weights of all members are the rows of the tensor."""
        rows = self._rows
        if self._weight is None or not rows:
            return False
        compiling = torch.compiler.is_compiling()
        for member, (weight, address) in zip(self.members, rows, strict=True):
            module = _plain_linear(member)
            if module is None or module.weight is not weight:
                return False
            # Conversions replace the data of a parameter. Compiled code has no addresses; there,
            # `follow` has noticed.
            if not compiling and weight.data_ptr() != address:
                return False
        return True

    def dissolve(self) -> None:
        """Let every layer multiply by itself from now on."""
        super().dissolve()
        self._weight, self._rows = None, ()


def _plain_linear(member: nn.Module) -> nn.Linear | None:
    """Return the child ``a`` if nothing but its weight matters, else None."""
    module = member._modules["a"]
    if type(module) is not nn.Linear:  # an adapter
        return None
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return None if hooked or type(module.weight) is not nn.Parameter else module


def _part(whole: Tensor, start: int, stop: int) -> Tensor:
    """Return rows of a matrix as a tensor that has a storage of its own on the same memory.

    Files of tensors that share a storage hold all of it for each of them (pickle), are refused
    (safetensors), or lack all but one (accelerate).
    """
    rows: Tensor = from_dlpack(to_dlpack(whole[start:stop]))
    return rows


def _can_move(weight: Tensor) -> bool:
    """Whether the data of a parameter may be copied elsewhere."""
    if weight.is_meta or weight.is_inference():
        return False
    if weight.is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return not weight.is_shared()  # with another process
