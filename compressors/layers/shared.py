"""Linear layers whose first part is another layer's: ``y = b(owner.a(x))``."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrc.compressors.layers.dictionary import SparseDictionary
from lrc.compressors.layers.form import Form, Shapes, Spec
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.packed import PackedMatrix
from lrc.compressors.layers.parts import Device, empty_linear
from lrc.compressors.layers.rank_form import RankForm

Owner = LowRank | SparseDictionary


class Sharing(Form):
    """A member of a group of layers that take their inputs through one common ``a``.

    The first of the group, the owner, is an ordinary layer of the form `OWNER` and holds ``a``; a
    member holds the rest and looks up the owner's ``a`` each time, adapters on it included. Its
    spec names the owner: ``"shares": "model.layers.0.self_attn.q_proj"``.

    Parameters are those of `Form`; the owner is named afterwards, by `share`.
    """

    OWNER: ClassVar[type[Owner]]
    WIDTH: ClassVar[str]
    """Name of the size that counts the rows of ``a``: owner and members have the same."""
    owner: Owner

    def share(self, owner: Owner) -> None:
        """Take ``a`` from `owner` from now on.

        Raises
        ------
        ValueError
            If its ``a`` is not [`WIDTH`, d_in] of this layer.
        """
        ours, theirs = ([getattr(one, self.WIDTH), one.in_features] for one in (self, owner))
        if ours != theirs:
            raise ValueError(f"needs a factor A {ours}, the layer it shares has {theirs}")
        # Past nn.Module's registration: a child would be stored, moved and listed once a member.
        # A copy or a pickle of the whole model keeps the sharing all the same.
        object.__setattr__(self, "owner", owner)

    def share_factor(self, tensors: Mapping[str, Tensor]) -> None:
        """Take ``a`` from tensors, by their names within the owner, without the layer itself."""
        like = next(self.parameters())
        owner = self.OWNER(
            self.in_features,
            self.out_features,
            bias=False,
            scheme=None if self.scheme is None else str(self.scheme),
            device=like.device,
            dtype=like.dtype,
            **{name: getattr(self, name) for name in self.SIZES},
        )
        owner.a.load_state_dict({leaf.removeprefix("a."): t for leaf, t in tensors.items()})
        self.share(owner)

    @classmethod
    def borrowed(cls, d_out: int, d_in: int, spec: Spec) -> list[str]:
        """Return the names within the owner of the tensors that stand for ``a``."""
        leaves = cls.OWNER.stored(d_out, d_in, spec, bias=False)
        return [leaf for leaf in leaves if leaf.startswith("a.")]

    def attach(self, model: nn.Module, spec: Spec) -> None:
        """Share with the layer that the spec names."""
        owner = model.get_submodule(spec["shares"])
        if type(owner) is not self.OWNER:  # members, a kind of it, have no a of their own
            raise ValueError(f"shares {spec['shares']}, which is no {self.OWNER.__name__}")
        self.share(owner)

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module: those of its owner's form but for ``a``."""
        shapes = cls.OWNER.shapes(d_out, d_in, spec, bias=bias)
        return {name: shape for name, shape in shapes.items() if name != "a.weight"}

    @classmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``(d_out, d_in)`` off its own tensors and the owner's ``a``."""
        borrowed = found[f"{spec['shares']}.a.weight"]
        return cls.OWNER.dense_shape(name, spec, {**found, f"{name}.a.weight": borrowed})

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count as for the owner: layers of a group have inputs of their own."""
        return cls.OWNER.multiply_adds(d_out, d_in, **sizes)

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """Say what is wrong with a spec; that the owner exists is for the whole table to say."""
        if not isinstance(spec.get("shares"), str):
            return "must name as 'shares' the layer that holds its factor"
        return super().problem(spec)

    def _a(self) -> nn.Linear | PackedMatrix:
        """Return what the owner has for ``a`` now."""
        return self.owner.a

    def _through_a(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., `WIDTH`], where the owner is, and bring it back."""
        a = self._a()
        home = next(a.parameters()).device
        # A device map may cut a group in two; what is offloaded, a hook brings to its input.
        p: Tensor = a(x if home.type == "meta" else x.to(home))
        return p.to(x.device)


class SharedLowRank(Sharing, RankForm):
    """A layer that projects its input on a basis ``A`` common to a group: ``b`` is its own.

    References
    ----------
    .. [1] "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression",
       ICLR 2025. https://arxiv.org/abs/2410.03765
    """

    BIAS = "b.bias"
    OWNER, WIDTH = LowRank, "rank"

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        d_out, rank = self.out_features, self.rank
        self.b = empty_linear(rank, d_out, bias=bias, device=device, dtype=dtype)

    @staticmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Return the second factor; `A` must be the owner's, which stores it."""
        return _without_a(LowRank.encode(B, A))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = self.b(self._through_a(x))
        return y

    def product(self) -> Tensor:
        """Return ``B @ A`` [d_out, d_in] in float32."""
        B = self.b.weight.float()
        return B @ self._a().weight.float().to(B.device)


class SharedDictionary(Sharing, SparseDictionary):
    """A layer with coefficients of its own for a dictionary common to a group.

    References
    ----------
    .. [1] D. Makhov et al., "CoSpaDi", 2025, the variant with shared dictionaries.
       https://arxiv.org/abs/2509.22075
    """

    OWNER, WIDTH = SparseDictionary, "atoms"

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        self._build_coefficients(bias=bias, device=device, dtype=dtype)

    @staticmethod
    def encode(D: Tensor, S: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Write the coefficients; `D` must be the owner's, which stores it."""
        return _without_a(SparseDictionary.encode(D, S, mask))


def _without_a(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "a.weight"}
