"""A residual stream in a basis of its own before every block: norms that hold the way to the next.

A norm without weights computes the same in every basis. Where the basis changes from one block to
the next, the residual branch of the block needs a matrix: ``x @ S`` where the layer adds ``x``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NORMS, BIASES = "norms", "biases"
"""Keys of these tables in a config's ``quantization_config``."""
NormTable = Mapping[str, Mapping[str, Any]]
"""Full name of a norm -> ``{"writer": NAME, "rank": R}`` if it holds a shortcut, or ``{}``."""


class UnitNorm(nn.Module):
    """RMS norm without weights.

    Parameters
    ----------
    width : int
        What the sum of squares is divided by: the dense model's width, also when the stream has
        become narrower, because that is what the norm it stands for divided by.
    eps : float
    shortcut : Tensor, shape [k, rank], optional
        ``F`` of ``S = I - F F^T``. Between bases that are turned towards each other S is symmetric
        and differs from the identity only where their spans do, which for two of k dimensions out
        of D is in ``D - k`` at most. So that no layer has to be written again, ``x @ (S - I)``
        rides along with the output of a linear that is added to ``x``, by `pay`.
    """

    shortcut: nn.Parameter | None

    def __init__(self, width: int, eps: float, shortcut: Tensor | None = None) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        found = None if shortcut is None else nn.Parameter(shortcut, requires_grad=False)
        self.register_parameter("shortcut", found)
        self._owed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(|x|^2 / width + eps)``, computed in float32 at least."""
        if self.shortcut is not None:  # now: weights that are offloaded are here only now
            self._owed = (x @ self.shortcut) @ self.shortcut.T
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        power = exact.square().sum(-1, keepdim=True) / self.width
        return (exact * torch.rsqrt(power + self.eps)).to(x.dtype)

    def pay(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        """Add to the output of the block's writer what its residual branch lacks: a hook."""
        owed, self._owed = self._owed, None
        assert owed is not None, "a writer was called before the norm of its block"
        return y - owed.to(y.device).reshape(y.shape)

    def extra_repr(self) -> str:
        """Show the sizes in a printed model."""
        rank = "" if self.shortcut is None else f", shortcut={list(self.shortcut.shape)}"
        return f"{self.width}, eps={self.eps}{rank}"


def add_biases_(model: nn.Module, names: Sequence[str]) -> None:
    """Give linears a bias, uninitialised.

    Raises
    ------
    ValueError
        If a name is that of no linear without one.
    """
    for name in names:
        linear = _find(model, name)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise ValueError(f"{BIASES} names {name!r}, which is no linear layer without a bias")
        linear.bias = nn.Parameter(linear.weight.new_empty(linear.out_features))


def place_norms_(model: Any, norms: NormTable) -> dict[str, list[int]]:
    """Put norms without weights in the places of a model's own; their shortcuts are uninitialised.

    Forms of linears have to be in their places by then.

    Returns
    -------
    dict of str to list of int
        Shape of every shortcut, by its full name.

    Raises
    ------
    ValueError
        If a name is that of no norm, or a writer that of no linear.
    """
    like, shapes = next(model.parameters()), {}
    for name, entry in norms.items():
        eps = norm_eps(_find(model, name))
        if eps is None:
            raise ValueError(f"{NORMS} names {name!r}, which is no norm")
        shortcut = None
        if entry:
            writer = _find(model, entry["writer"])
            k = getattr(writer, "out_features", None)
            if k is None:
                raise ValueError(f"{NORMS}[{name!r}] names {entry['writer']!r}, no linear layer")
            shapes[f"{name}.shortcut"] = [k, entry["rank"]]
            shortcut = like.new_empty(k, entry["rank"])
        norm = UnitNorm(model.config.hidden_size, eps, shortcut)
        model.set_submodule(name, norm)
        if entry:
            writer.register_forward_hook(norm.pay)
    return shapes


def norm_eps(norm: Any) -> float | None:
    """Return what a norm adds to the mean square; classes disagree on its name."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if eps is None else float(eps)


def _find(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
