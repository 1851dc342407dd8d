"""Norms without weights for models whose residual stream changes its basis between blocks.

An RMS norm without weights computes the same in every orthonormal basis, so each block can use the
basis in which its inputs are best truncated. Where the basis changes from one block to the next,
the residual connection needs a matrix: the layer adds ``x @ S`` instead of ``x`` (SliceGPT,
https://arxiv.org/abs/2401.15024).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NORMS, BIASES = "norms", "biases"
"""Keys of these tables in a config's ``quantization_config``."""
NormTable = Mapping[str, Mapping[str, Any]]
"""Full name of a norm -> ``{}``, or ``{"writer": NAME, "rank": R}`` if the basis changes there."""


class UnitNorm(nn.Module):
    """RMS norm without weights, and the change of basis of a residual connection.

    Parameters
    ----------
    width : int
        Divisor of the sum of squares: the width of the dense model, even if the residual stream is
        narrower now, because the dense norm divided by it.
    eps : float
    shortcut : Tensor, shape [k, rank], optional
        ``F`` of ``S = I - F F^T``. If the two bases are aligned by a rotation within their spans, S
        is symmetric and differs from the identity only where the spans do: in at most ``D - k``
        directions for k of D dimensions. The layer's source code is not changed; instead the
        difference ``x @ (S - I)`` is added to the output of the linear layer that writes to the
        residual stream, by the hook `add_shortcut`.
    """

    shortcut: nn.Parameter | None

    def __init__(self, width: int, eps: float, shortcut: Tensor | None = None) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        found = None if shortcut is None else nn.Parameter(shortcut, requires_grad=False)
        self.register_parameter("shortcut", found)
        self._difference: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(|x|^2 / width + eps)``, computed in float32 at least."""
        if self.shortcut is not None:  # offloaded weights are only available during this call
            self._difference = (x @ self.shortcut) @ self.shortcut.T
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        power = exact.square().sum(-1, keepdim=True) / self.width
        return (exact * torch.rsqrt(power + self.eps)).to(x.dtype)

    def add_shortcut(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        """Forward hook of the writer: add ``x @ (S - I)`` to its output ``y``."""
        difference, self._difference = self._difference, None
        assert difference is not None, "a writer was called before the norm of its block"
        return y - difference.to(y.device).reshape(y.shape)

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        rank = "" if self.shortcut is None else f", shortcut={list(self.shortcut.shape)}"
        return f"{self.width}, eps={self.eps}{rank}"


def add_biases_(model: nn.Module, names: Sequence[str]) -> None:
    """Give linear layers an uninitialized bias.

    Raises
    ------
    ValueError
        If a name is not that of a linear layer without bias.
    """
    for name in names:
        linear = find_module(model, name)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise ValueError(f"{BIASES} lists {name!r}, which is not a linear layer without bias")
        linear.bias = nn.Parameter(linear.weight.new_empty(linear.out_features))


def place_norms_(model: Any, norms: NormTable) -> dict[str, list[int]]:
    """Replace norms of a model by `UnitNorm` with uninitialized shortcuts.

    Compressed linear layers must be in place already, because hooks are registered on writers.

    Returns
    -------
    dict of str to list of int
        Shape of every shortcut by its full name.

    Raises
    ------
    ValueError
        If a name is not that of a norm, or a writer not that of a linear layer.
    """
    like, shapes = next(model.parameters()), {}
    for name, entry in norms.items():
        eps = norm_eps(find_module(model, name))
        if eps is None:
            raise ValueError(f"{NORMS} lists {name!r}, which is not a norm")
        if not entry:
            model.set_submodule(name, UnitNorm(model.config.hidden_size, eps))
            continue
        writer = find_module(model, entry["writer"])
        k = getattr(writer, "out_features", None)
        if k is None:
            raise ValueError(f"{NORMS}[{name!r}] lists {entry['writer']!r}, not a linear layer")
        shapes[f"{name}.shortcut"] = [k, entry["rank"]]
        norm = UnitNorm(model.config.hidden_size, eps, like.new_empty(k, entry["rank"]))
        model.set_submodule(name, norm)
        writer.register_forward_hook(norm.add_shortcut)
    return shapes


def norm_eps(norm: Any) -> float | None:
    """Return the epsilon of a norm; classes use different names for it."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if eps is None else float(eps)


def find_module(model: nn.Module, name: str) -> Any:
    """Return a submodule, or None if there is none of that name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
