"""A linear layer of integers of which some groups are stored, one bit a group says which."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrc.compressors.layers.bits import pack_bits, packed_width, unpack_bits
from lrc.compressors.layers.form import Shapes, Sizes, Spec
from lrc.compressors.layers.integers import Integers
from lrc.compressors.layers.packed import encode_values, read_values
from lrc.compressors.layers.parts import SENTINEL, Device, sentinel
from lrc.compressors.layers.scheme import Scheme


class GroupSparse(Integers):
    """Compute ``y = x @ W_hat.T + bias`` where many groups of a row of ``W_hat`` are zero.

    A group is what shares a scale: consecutive columns of a row, as many as the scheme says. The
    codes of the kept ones stand row after row without gaps, and so do their scales; a mask of one
    bit a group says where they belong. `groups` counts those of the whole matrix. The weight is put
    together anew for every call: this form saves bytes, not arithmetic.

    Notes
    -----
    The format of [1]_ holds row offsets and an index a group instead of a mask: 16 bits or so for
    every kept group, where this takes one for every group there is.

    References
    ----------
    .. [1] C. Zeng et al., "GQSA: Group Quantization and Sparsity for Accelerating Large Language
       Model Inference", 2024. https://arxiv.org/abs/2412.17560
    """

    SIZES: ClassVar[tuple[str, ...]] = ("groups",)
    groups: int
    mask: Tensor
    weight_packed: Tensor
    weight_scale: Tensor

    def _pack(self, scheme: Scheme, *, device: Device, dtype: torch.dtype | None) -> None:
        spec = {"groups": self.groups, "scheme": str(scheme)}
        stored = self.stored(self.out_features, self.in_features, spec, bias=False)
        for name in ("weight_packed", "mask"):
            shape, kind = stored[name]
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        scale = torch.empty(stored["weight_scale"][0], dtype=dtype, device=device)
        self.weight_scale = nn.Parameter(scale)

    @classmethod
    def shapes(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the kept groups [groups, width], of which `stored` makes integers, and the mask.

        Raises
        ------
        ValueError
            If the scheme cannot group the rows, or there are not so many groups.
        """
        width = _width(Scheme.read(spec["scheme"]))
        groups, a_row = spec["groups"], Scheme.read(spec["scheme"]).groups(d_in)
        if not 1 <= groups <= d_out * a_row:
            raise ValueError(
                f"groups must be in [1, {d_out * a_row}] for [{d_out}, {d_in}], got {groups}"
            )
        tensors: Shapes = {**SENTINEL, "groups": ([groups, width], None)}
        tensors["mask"] = [d_out, packed_width(a_row)], torch.uint8
        if bias or spec.get("bias"):
            tensors[cls.BIAS] = [d_out], None
        return tensors

    @classmethod
    def stored(cls, d_out: int, d_in: int, spec: Spec, *, bias: bool) -> Shapes:
        """Return the tensors of the file; raises as `Form.stored`."""
        tensors = super().stored(d_out, d_in, spec, bias=bias)
        kept, _ = tensors.pop("groups")
        return tensors | Scheme.read(spec["scheme"]).values("weight", kept)

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """Say what is wrong with a spec."""
        problem = super().problem(spec)
        if problem is None:
            try:
                _width(Scheme.read(spec["scheme"]))
            except ValueError as error:
                return f"has a 'scheme' that {error}"
        return problem

    @classmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return the number of groups of one column: how wide they are, only a scheme tells."""
        return d_out * d_in

    @classmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return the number of kept groups."""
        return {"groups": step}

    @classmethod
    def written(cls, d_out: int, d_in: int, sizes: Sizes) -> str:
        """Return the number of kept groups."""
        return f"{sizes['groups']} groups"

    @staticmethod
    def encode(codes: Tensor, scale: Tensor, mask: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        """Write the kept groups as the tensors of the file, by the names of `stored`.

        Parameters
        ----------
        codes : Tensor, shape [groups, width], integer
            Row after row.
        scale : Tensor, shape [groups]
        mask : Tensor, shape [d_out, d_in / width]
            True where a group is kept.
        scheme : Scheme
            With a group size, and symmetric.
        """
        packed = encode_values("weight", codes.flatten(), scale, scheme)
        return {"weight": sentinel(codes), "mask": pack_bits(mask), **packed}

    def _whole(self) -> Tensor:
        assert self.scheme is not None
        width = _width(self.scheme)
        numbers = read_values(
            self.weight_packed, self.weight_scale, self.groups * width, self.scheme
        )
        kept = unpack_bits(self.mask, self.in_features // width)  # [d_out, groups a row]
        whole = numbers.new_zeros(*kept.shape, width)
        return whole.masked_scatter(kept[:, :, None], numbers).flatten(1)  # [d_out, d_in]


def _width(scheme: Scheme) -> int:
    """Return the columns of a group; raises ValueError for a scheme that the form cannot have."""
    if scheme.group_size is None or not scheme.symmetric:
        raise ValueError(f"must be written like int4-g16, symmetric and in groups, got '{scheme}'")
    return scheme.group_size
