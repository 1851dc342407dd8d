"""A quantized matrix of which some groups are stored, with a bit mask of their positions."""

import torch
from torch import Tensor

from lrc.compressors.kernels import Need, run_or_restore, select
from lrc.compressors.kernels.masked import GROUPS
from lrc.compressors.layers.bitmask import mask_problems, pack_bits, packed_width, unpack_bits
from lrc.compressors.layers.component import ComponentConfig, check_range
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.layers.packed_weight import CONVERTED, state_of
from lrc.compressors.layers.packing import encode_values, unpack_integers
from lrc.compressors.layers.quantization_args import QuantizationArgs, TensorSpec, TensorSpecs


class BlockSparse(MaskedWeight):
    """Groups of consecutive columns of a row that are either stored or zero.

    A group is what shares a scale. The codes of the stored groups follow each other row by row
    without gaps, and so do their scales; a mask has one bit per group. `groups` is the number of
    stored groups of the whole matrix. Without a fast path the matrix is dequantized for every call.

    On a CPU the fast path is that of dense integers: a copy has codes for all groups, and the scale
    of those that are not stored is zero. Reading a mask takes longer than multiplying by zeros.

    Notes
    -----
    The format of [1]_ stores row offsets and a column index per group: about 16 bits for every
    stored group, where the mask takes one bit for every group.

    References
    ----------
    .. [1] C. Zeng et al., "GQSA: Group Quantization and Sparsity for Accelerating Large Language
       Model Inference", 2024. https://arxiv.org/abs/2412.17560
    """

    _scale_state: tuple[int, int] | None = None

    TYPE = "block_sparse"
    SIZES = ("groups",)

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return the stored groups as ``values`` [groups, group_size], and their ``mask``."""
        args = _grouped(config)
        per_row = args.groups(d_in)
        check_range("groups", config.sizes["groups"], d_out * per_row, d_out, d_in)
        stored = [config.sizes["groups"], d_in // per_row]
        return {
            "values": TensorSpec(stored, role="values"),
            "mask": TensorSpec([d_out, packed_width(per_row)], torch.uint8),
        }

    @classmethod
    def largest_step(cls, d_out: int, d_in: int, *, pattern: str | None = None) -> int:
        """Return the number of groups of one column; the width depends on the quantization."""
        return d_out * d_in

    @classmethod
    def describe(cls, d_out: int, d_in: int, config: ComponentConfig) -> str:
        """Return the number of stored groups."""
        return f"{config.sizes['groups']} groups"

    @staticmethod
    def encode(  # type: ignore[override]
        codes: Tensor, scale: Tensor, mask: Tensor, args: QuantizationArgs
    ) -> dict[str, Tensor]:
        """Pack the stored groups.

        Parameters
        ----------
        codes : Tensor, shape [groups, group_size], integer
            Row by row.
        scale : Tensor, shape [groups]
        mask : Tensor, shape [d_out, d_in / group_size]
            True for stored groups.
        args : QuantizationArgs
            Symmetric, with a group size.
        """
        return {"mask": pack_bits(mask), **encode_values("values", codes.flatten(), scale, args)}

    def layout(self) -> tuple[int, int, int, int]:
        """Return how the groups are laid out."""
        return GROUPS, self.d_in, 0, self.values_group()

    def _select(self) -> str | None:
        args, scale = _grouped(self.config), self.get_parameter("values_scale")
        if not (scale.is_cpu and self.get_buffer("mask").is_cpu):
            return super()._select()
        shape = (self.d_out, self.d_in)
        size = args.group_size
        found = select(Need("packed_linear", args.bits, scale.device, scale.dtype, shape, size))
        if isinstance(found, str):
            return found
        if found.layout is None:
            return f"{found.name}: reads packed integers only"
        with torch.no_grad():
            converted = found.layout.pack(*self._all_groups(), None, args.bits)
        self._derive(**{CONVERTED + key: tensor for key, tensor in converted.items()})
        self.entry, self._scale_state = found, state_of(scale)
        return None

    def masked_product(self, x: Tensor) -> Tensor | None:
        """Map ``x`` [..., d_in] to [..., d_out] with the fast path, or return None."""
        if self.entry is None or self.entry.layout is None:
            return super().masked_product(x)
        scale = self._parameters["values_scale"]
        assert scale is not None
        if x.shape[-1] != self.d_in or not self.is_fast(x, scale):
            return None
        # Guards of compiled code do not see versions of tensors.
        if not torch.compiler.is_compiling() and self._scale_state != state_of(scale):
            self.optimize()
        converted = {name.removeprefix(CONVERTED): self._buffers[name] for name in self._derived}
        flat, bits = x.reshape(-1, self.d_in), _grouped(self.config).bits
        y: Tensor | None = run_or_restore(self, flat, converted, bits, self.d_out)
        return None if y is None else y.view(*x.shape[:-1], self.d_out)

    def _all_groups(self) -> tuple[Tensor, Tensor]:
        """Return codes [d_out, d_in], int8, and scales [d_out, groups]; zeros if not stored."""
        bits, size = _grouped(self.config).bits, self.values_group()
        kept = unpack_bits(self.get_buffer("mask"), self._per_row)  # [d_out, groups]
        scale = self.get_parameter("values_scale").detach()
        stored = unpack_integers(self.get_buffer("values_packed"), bits, scale.numel() * size)
        codes = stored.new_zeros(*kept.shape, size)
        codes[kept] = stored.view(-1, size)
        return codes.flatten(1), scale.new_zeros(kept.shape).masked_scatter_(kept, scale)

    def matrix(self) -> Tensor:
        """Return the dequantized matrix [d_out, d_in]."""
        groups = self.stored_values()  # [groups, group_size]
        return self.at_places(groups, self._per_row, groups.shape[1])

    def problems(self) -> list[str]:
        """Return violated invariants: the mask must have as many bits as there are groups."""
        mask, count = self.get_buffer("mask"), self.config.sizes["groups"]
        return super().problems() + mask_problems(mask, self._per_row, count)

    @property
    def _per_row(self) -> int:
        return _grouped(self.config).groups(self.d_in)


def _grouped(config: ComponentConfig) -> QuantizationArgs:
    args = config.quantization
    if args is None or args.group_size is None or not args.symmetric:
        raise ValueError(
            f"quantization must be symmetric with a group size, like int4-g16, got {args}"
        )
    return args
