"""A linear layer whose whole weight is integers of few bits."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrc.compressors.layers.form import Form, Shapes, Sizes, Spec
from lrc.compressors.layers.packed import add_packed_, read_packed
from lrc.compressors.layers.parts import SENTINEL, Device, empty_linear
from lrc.compressors.layers.scheme import Scheme


class Integers(Form):
    """Compute ``y = x @ W_hat.T + bias`` from the integers and scales of ``W_hat``.

    The weight is put together anew for every call: this form saves bytes, not arithmetic. Its
    tensors have the names and the layout of compressed-tensors' ``pack-quantized`` format.
    """

    SIZES: ClassVar[tuple[str, ...]] = ()
    BIAS = "bias"

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        d_out = self.out_features
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None

    def _pack(self, scheme: Scheme, *, device: Device, dtype: torch.dtype | None) -> None:
        d_out, d_in = self.out_features, self.in_features
        add_packed_(self, d_out, d_in, scheme, device=device, dtype=dtype)

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the weight, of which `stored` makes integers."""
        tensors: Shapes = {"weight": ([d_out, d_in], None)}
        if bias or spec.get("bias"):
            tensors[cls.BIAS] = [d_out], None
        return tensors

    @classmethod
    def stored(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of the file; raises as `Form.stored`."""
        return {**super().stored(d_out, d_in, spec, bias=bias), **SENTINEL}

    @classmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``(d_out, d_in)`` off the spec."""
        d_out, d_in = spec["shape"]
        return d_out, d_in

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """Say what is wrong with a spec."""
        if spec.get("scheme") is None:
            return "must hold a 'scheme'"
        return super().problem(spec)

    @classmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return 1: there is one size."""
        return 1

    @classmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return no sizes: a scheme says it all."""
        return {}

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the dense product, which is what is computed."""
        return d_out * d_in

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        return nn.functional.linear(x, self._whole(), self.bias)

    def product(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""
        return self._whole().float()

    def _whole(self) -> Tensor:
        assert self.scheme is not None
        return read_packed(self, self.out_features, self.in_features, self.scheme)


class IntegersPlusLowRank(Integers):
    """Compute ``y = x @ (Q + B @ A).T + bias``: integers, and a product that mends their rounding.

    The factors are no integers: there is little of them, and they hold what integers cannot.

    References
    ----------
    .. [1] C. Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction",
       ICLR 2025. https://arxiv.org/abs/2410.06040
    """

    SIZES: ClassVar[tuple[str, ...]] = ("rank",)
    rank: int

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        super()._build(bias=bias, device=device, dtype=dtype)
        d_in, d_out, rank = self.in_features, self.out_features, self.rank
        self.a = empty_linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.b = empty_linear(rank, d_out, bias=False, device=device, dtype=dtype)

    @classmethod
    def branch(cls, d_out: int, d_in: int, spec: Spec) -> Shapes:
        """Return the tensors of the product."""
        rank = spec["rank"]
        return {"a.weight": ([rank, d_in], None), "b.weight": ([d_out, rank], None)}

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return weight and product; `stored` makes integers of the weight."""
        return super().shapes(d_out, d_in, spec, bias=bias) | cls.branch(d_out, d_in, spec)

    @classmethod
    def stored(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of the file; raises as `Form.stored`."""
        whole = Integers.stored(d_out, d_in, spec, bias=bias)
        return whole | cls.branch(d_out, d_in, spec)

    @classmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return the largest rank."""
        return min(d_out, d_in)

    @classmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return the rank."""
        return {"rank": step}

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the dense product and of both factors."""
        return d_out * d_in + sizes["rank"] * (d_out + d_in)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = super().forward(x) + self.b(self.a(x))
        return y

    def product(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""
        return super().product() + self.b.weight.float() @ self.a.weight.float()
