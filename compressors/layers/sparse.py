"""A linear layer of which only some weights are stored, with one bit an entry to say which."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrc.compressors.layers.bits import pack_bits, packed_width, spread
from lrc.compressors.layers.form import Form, Shapes, Sizes, Spec
from lrc.compressors.layers.parts import SENTINEL, Device, sentinel


class Sparse(Form):
    """Compute ``y = x @ W_hat.T + bias`` where many entries of ``W_hat`` are zero.

    The values stand row after row without gaps; a mask of one bit an entry says where they belong.
    The product is that of the dense weight, put together anew for every call: this form saves
    bytes, not arithmetic. `nonzeros` counts the values of the whole matrix.

    With pattern 2:4 every four entries of a row have two values and four bits of the mask: as many
    bits as the two indices of two bits that sparse tensor cores read, and no less information.
    """

    SIZES = ("nonzeros",)
    BIAS = "bias"
    PATTERNS = ("2:4",)
    nonzeros: int
    mask: Tensor

    def _build(self, *, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        d_in, d_out = self.in_features, self.out_features
        self.values = nn.Parameter(torch.empty(self.nonzeros, device=device, dtype=dtype))
        mask = torch.empty(d_out, packed_width(d_in), dtype=torch.uint8, device=device)
        self.register_buffer("mask", mask)
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of one module: values and mask."""
        nonzeros = spec["nonzeros"]
        if nonzeros > d_out * d_in:
            raise ValueError(
                f"nonzeros must be in [1, {d_out * d_in}] for [{d_out}, {d_in}], got {nonzeros}"
            )
        if spec.get("d_in", d_in) != d_in:
            raise ValueError(f"d_in must be {d_in} for [{d_out}, {d_in}], got {spec['d_in']}")
        cls.check_pattern(d_out, d_in, spec)
        tensors: Shapes = {**SENTINEL, "values": ([nonzeros], None)}
        tensors["mask"] = [d_out, packed_width(d_in)], torch.uint8
        if bias or spec.get("bias"):
            tensors[cls.BIAS] = [d_out], None
        return tensors

    @classmethod
    def extra(cls, d_out: int, d_in: int) -> Spec:
        """Return ``d_in``, which the mask tells only up to a byte."""
        return {"d_in": d_in}

    @classmethod
    def dense_shape(cls, name: str, spec: Spec, found: Mapping[str, list[int]]) -> tuple[int, int]:
        """Read ``d_out`` off the mask, and ``d_in`` off the spec."""
        return found[f"{name}.mask"][0], spec["d_in"]

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """Say what is wrong with a spec."""
        d_in = spec.get("d_in")
        if not isinstance(d_in, int) or d_in is True or d_in < 1:
            return "must hold 'd_in': N >= 1"
        return super().problem(spec)

    @classmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return the number of entries."""
        return d_out * d_in

    @classmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return the number of values."""
        return {"nonzeros": step}

    @classmethod
    def two_of_four(cls, d_out: int, d_in: int, sizes: Sizes) -> Sizes:
        """Return the only number of values there is: half of the entries."""
        if d_in % 4:
            raise ValueError(f"pattern 2:4 needs inputs in fours, got a weight [{d_out}, {d_in}]")
        return {"nonzeros": d_out * d_in // 2}

    @classmethod
    def written(cls, d_out: int, d_in: int, sizes: Sizes) -> str:
        """Return the share of the entries that are stored."""
        return f"{sizes['nonzeros'] / (d_out * d_in):.1%} of entries"

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, **sizes: int) -> int:
        """Count those of the dense product, which is what is computed."""
        return d_out * d_in

    @staticmethod
    def encode(W_hat: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Write the entries of `W_hat` [d_out, d_in] that `mask` [d_out, d_in] keeps."""
        return {"weight": sentinel(W_hat), "values": W_hat[mask], "mask": pack_bits(mask)}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        return nn.functional.linear(x, self._whole(), self.bias)

    def product(self) -> Tensor:
        """Return ``W_hat`` [d_out, d_in] in float32."""
        return self._whole().float()

    def _whole(self) -> Tensor:
        return spread(self._numbers(), self.mask, self.in_features)
