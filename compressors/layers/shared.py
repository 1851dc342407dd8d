"""A linear layer whose first factor is another layer's: ``y = b(owner.a(x))``."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrc.compressors.layers.form import (
    SENTINEL,
    Device,
    RankForm,
    Shapes,
    Spec,
    empty_linear,
    sentinel,
)
from lrc.compressors.layers.low_rank import LowRank


class SharedLowRank(RankForm):
    """A member of a group of layers that project their inputs on one common basis ``A``.

    The first of the group, the owner, is an ordinary `LowRank` and holds ``a``; a member holds its
    ``b`` and looks up the owner's ``a`` each time, adapters on it included. Its spec names the
    owner: ``"shares": "model.layers.0.self_attn.q_proj"``.

    Parameters are those of `Form`; the owner is named afterwards, by `share`.

    References
    ----------
    .. [1] "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression",
       ICLR 2025. https://arxiv.org/abs/2410.03765
    """

    BIAS = "b.bias"
    owner: LowRank

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        d_out, rank = self.out_features, self.rank
        self.b = empty_linear(rank, d_out, bias=bias, device=device, dtype=dtype)

    def share(self, owner: LowRank) -> None:
        """Take ``a`` from `owner` from now on.

        Raises
        ------
        ValueError
            If its ``a`` is not [rank, d_in] of this layer.
        """
        ours, theirs = (self.rank, self.in_features), (owner.rank, owner.in_features)
        if ours != theirs:
            raise ValueError(f"needs a factor A {[*ours]}, the layer it shares has {[*theirs]}")
        # Past nn.Module's registration: a child would be stored, moved and listed once a member.
        # A copy or a pickle of the whole model keeps the sharing all the same.
        object.__setattr__(self, "owner", owner)

    def attach(self, model: nn.Module, spec: Spec) -> None:
        """Share with the layer that the spec names."""
        owner = model.get_submodule(spec["shares"])
        if not isinstance(owner, LowRank):
            raise ValueError(f"shares {spec['shares']}, which is no low_rank layer")
        self.share(owner)

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module: the second factor alone."""
        tensors: Shapes = {**SENTINEL, "b.weight": ([d_out, spec["rank"]], None)}
        if bias or spec.get("bias"):
            tensors[cls.BIAS] = [d_out], None
        return tensors

    @classmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``(d_out, d_in)`` off the second factor and the owner's first."""
        return found[f"{name}.b.weight"][0], found[f"{spec['shares']}.a.weight"][1]

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the two products: layers of a group have inputs of their own."""
        return sizes["rank"] * (d_out + d_in)

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Return the second factor; `A` must be the owner's, which stores it."""
        return {"weight": sentinel(B), "b.weight": B}

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """Say what is wrong with a spec; that the owner exists is for the whole table to say."""
        if not isinstance(spec.get("shares"), str):
            return "must name as 'shares' the layer that holds its factor"
        return super().problem(spec)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        home = self.owner.a.weight.device
        # A device map may cut a group in two; what is offloaded, a hook brings to its input.
        p = self.owner.a(x if home.type == "meta" else x.to(home))  # [..., rank]
        y: Tensor = self.b(p.to(x.device))
        return y

    def product(self) -> Tensor:
        """Return ``B @ A`` [d_out, d_in] in float32."""
        B = self.b.weight.float()
        return B @ self.owner.a.weight.float().to(B.device)
