"""What modules with a fast product have in common, and switching it on for a model."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.implementations import Entry

log = logging.getLogger(__name__)


class FastPath(nn.Module, ABC):
    """Base class of modules that can replace their plain product by an entry of the table.

    The plain product stays available: it is used for training and wherever no entry fits. A module
    that has selected an entry selects again when its tensors are moved, converted, loaded or
    copied.
    """

    entry: Entry | None = None
    """The implementation in use; None for the plain product."""
    reason: str | None = None
    """Why there is no fast path, after `optimize` has been called. None, too, where the plain
    product is as fast."""
    _optimized = False
    _derived: tuple[str, ...] = ()

    def optimize(self) -> str | None:
        """Select a fast path for the current device and dtype; return the reason if none fits."""
        self.restore()
        self.reason = self._select()
        self._optimized = True
        return self.reason

    @abstractmethod
    def _select(self) -> str | None:
        """Set `entry`, or return why none fits; None if the plain product is as fast."""

    def _derive(self, **tensors: Tensor) -> None:
        """Register buffers that the entry needs; they are not part of the state dict."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._derived += tuple(tensors)

    def restore(self) -> None:
        """Return to the plain product and to the stored tensors."""
        for name in self._derived:
            delattr(self, name)
        self._derived = ()
        self.entry = self.reason = None
        self._optimized = False

    def is_fast(self, x: Tensor, like: Tensor) -> bool:
        """Return whether the fast path serves this call.

        It computes no gradients, and serves inputs on the device and in the dtype of the weight.

        Parameters
        ----------
        x : Tensor, shape [..., d_in]
        like : Tensor
            A floating-point tensor of the weight.
        """
        entry = self.entry
        return (
            entry is not None
            and x.dtype == like.dtype
            and x.device == like.device
            and like.device.type == entry.device
            and (entry.rows is None or x.numel() <= entry.rows * x.shape[-1])
            and not needs_gradients(x, like)
            and not torch.is_autocast_enabled(entry.device)
        )

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        optimized = self._optimized
        self.restore()
        super()._load_from_state_dict(*args, **options)
        if optimized:
            self.optimize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the stored tensors, and select for their new device and dtype."""
        optimized = self._optimized
        self.restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if optimized:
            self.optimize()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the stored tensors: derived ones depend on device and processor."""
        kept = {name: tensor for name, tensor in self._buffers.items() if name not in self._derived}
        names = self._non_persistent_buffers_set.difference(self._derived)
        changed = {"_buffers": kept, "_non_persistent_buffers_set": names}
        return {**self.__dict__, **changed, "_derived": (), "entry": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Select a fast path where the copy is."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._optimized:
            self.optimize()


def needs_gradients(*tensors: Tensor) -> bool:
    """Return whether autograd would record a product of these tensors."""
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def ignore(tensors: Iterable[Tensor]) -> None:
    """Leave tensors to the garbage collector."""


def optimize(
    model: nn.Module, *, replaced: Callable[[Iterable[Tensor]], None] = ignore
) -> dict[str, str]:
    """Select fast paths for all modules of a model that can have one.

    Loading with `from_pretrained` does this. It is undone by ``model.dequantize()``; a model that
    was moved, or whose dtype changed, selects again. On a GPU, one warning names all modules
    without a fast path.

    Parameters
    ----------
    replaced : callable, optional
        Called after each module with the tensors that others have replaced.

    Returns
    -------
    dict of str to str
        Why a module has no fast path, by its name.
    """
    for module in model.modules():
        if isinstance(module, FastPath):
            before = _tensors(module)
            module.optimize()
            after = {id(tensor) for tensor in _tensors(module)}
            replaced([tensor for tensor in before if id(tensor) not in after])
    slow = slow_layers(model)
    devices = {str(p.device): None for p in model.parameters() if p.device.type == "cuda"}
    if slow and devices:
        log.warning("%s", _sentence(slow, " and ".join(devices)))
    return slow


def _tensors(module: Any) -> list[Tensor]:
    found = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in found if tensor is not None]


def _sentence(slow: dict[str, str], device: str) -> str:
    """Return one sentence about modules without a fast path."""
    found: dict[str, list[str]] = {}
    for name, reason in slow.items():
        found.setdefault(reason, []).append(name)
    parts = [
        f"{reason} ({len(names)} modules, such as {names[0] or 'the model'})"
        for reason, names in found.items()
    ]
    return (
        f"without a fast path on {device}, compressed weights are multiplied by plain PyTorch, "
        f"which may be slower than the dense model: {'; '.join(parts)}"
    )


def slow_layers(model: nn.Module) -> dict[str, str]:
    """Return why modules have no fast path, by their names."""
    named: Any = model.named_modules()
    return {
        name: module.reason
        for name, module in named
        if isinstance(module, FastPath) and module.entry is None and module.reason is not None
    }
