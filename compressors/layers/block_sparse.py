"""A quantized matrix of which some groups are stored, with a bit mask of their positions."""

import torch
from torch import Tensor

from lrc.compressors.kernels.masked import GROUPS
from lrc.compressors.layers.bitmask import mask_problems, pack_bits, packed_width, unpack_bits
from lrc.compressors.layers.component import ComponentConfig, check_range
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.layers.packing import encode_values
from lrc.compressors.layers.quantization_args import QuantizationArgs, TensorSpec, TensorSpecs


class BlockSparse(MaskedWeight):
    """Groups of consecutive columns of a row that are either stored or zero.

    A group is what shares a scale. The codes of the stored groups follow each other row by row
    without gaps, and so do their scales; a mask has one bit per group. `groups` is the number of
    stored groups of the whole matrix. Without a fast path the matrix is dequantized for every call.

    Notes
    -----
    The format of [1]_ stores row offsets and a column index per group: about 16 bits for every
    stored group, where the mask takes one bit for every group.

    References
    ----------
    .. [1] C. Zeng et al., "GQSA: Group Quantization and Sparsity for Accelerating Large Language
       Model Inference", 2024. https://arxiv.org/abs/2412.17560
    """

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
    def largest_step(cls, d_out: int, d_in: int) -> int:
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

    def matrix(self) -> Tensor:
        """Return the dequantized matrix [d_out, d_in]."""
        groups = self.stored_values()  # [groups, group_size]
        kept = unpack_bits(self.get_buffer("mask"), self._per_row)
        whole = groups.new_zeros(*kept.shape, groups.shape[1])
        return whole.masked_scatter(kept[:, :, None], groups).flatten(1)

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
