"""What modules with a fast product have in common, and switching it on for a model."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.table import Entry

log = logging.getLogger(__name__)


class FastPath:
    """Mixin of modules that can replace their plain product by an entry of the table.

    The plain product stays available: it is used for training and wherever no entry fits.
    """

    entry: Entry | None = None
    """The implementation in use; None for the plain product."""
    reason: str | None = None
    """Why there is no fast path, after `optimize` has been called."""

    def optimize(self) -> str | None:
        """Select a fast path for the current device and dtype; return the reason if none fits."""
        raise NotImplementedError

    def restore(self) -> None:
        """Return to the plain product and to the stored tensors."""
        self.entry = None

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


def needs_gradients(*tensors: Tensor) -> bool:
    """Return whether autograd would record a product of these tensors."""
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def optimize(model: nn.Module) -> dict[str, str]:
    """Select fast paths for all modules of a model that can have one.

    Loading with `from_pretrained` does this. It is undone by ``model.dequantize()``; a model that
    was moved, or whose dtype changed, selects again.

    Returns
    -------
    dict of str to str
        Why a module has no fast path, by its name.
    """
    for module in model.modules():
        if isinstance(module, FastPath):
            module.optimize()
    slow = slow_layers(model)
    for reason, names in _by_reason(slow).items():
        if any(device.type == "cuda" for device in _devices(model)):
            log.warning("%d layers have no fast path, such as %s: %s", len(names), names[0], reason)
    return slow


def _by_reason(slow: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in slow.items():
        found.setdefault(reason, []).append(name)
    return found


def _devices(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


def slow_layers(model: nn.Module) -> dict[str, str]:
    """Return why modules have no fast path, by their names."""
    named: Any = model.named_modules()
    return {
        name: module.reason
        for name, module in named
        if isinstance(module, FastPath) and module.entry is None and module.reason is not None
    }
