"""The block types of GGUF that store the integers of lrc exactly."""

from dataclasses import dataclass

from lrc.compressors.layers.quantization_args import SUPER_BLOCK, QuantizationArgs

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A block type: consecutive numbers of a row that are stored together."""

    name: str
    """As ggml writes it."""
    bits: int
    """Of a code."""
    symmetric: bool
    """Whether blocks have no minimum."""
    block: int
    """Numbers of a block."""
    bytes: int
    """Of a block."""
    group: int = BLOCK
    """Numbers of a block that share a scale."""

    @property
    def super_blocks(self) -> bool:
        """Whether scales are stored as multiples of a common number."""
        return self.block == SUPER_BLOCK


BLOCK_TYPES = (
    BlockType("Q3_K", 3, True, SUPER_BLOCK, 110, group=16),
    BlockType("Q4_0", 4, True, BLOCK, 18),
    BlockType("Q4_1", 4, False, BLOCK, 20),
    BlockType("Q5_0", 5, True, BLOCK, 22),
    BlockType("Q5_1", 5, False, BLOCK, 24),
    BlockType("Q6_K", 6, True, SUPER_BLOCK, 210, group=16),
    BlockType("Q8_0", 8, True, BLOCK, 34),
)
"""In ascending order of size."""

EXACT_SCHEMES = tuple(
    QuantizationArgs(each.bits, each.group, each.symmetric, each.super_blocks)
    for each in BLOCK_TYPES
)
"""The scheme of every block type whose scales and codes fill it."""


def block_type(args: QuantizationArgs, columns: int) -> BlockType | str:
    """Return the smallest block type for a matrix, or a clause that says why there is none."""
    multiple = SUPER_BLOCK if args.super_blocks else BLOCK
    if columns % multiple:
        return f"its rows of {columns} numbers are not a multiple of {multiple}"
    fitting = [
        each
        for each in BLOCK_TYPES
        if each.super_blocks == args.super_blocks and each.symmetric == args.symmetric
    ]
    group = fitting[0].group
    if args.group_size is not None and args.group_size % group:
        return f"the groups of {args} are not a multiple of {group}"
    minimums = "" if args.symmetric else "minimums and "
    blocks = "super-blocks with " if args.super_blocks else ""
    reason = f"no block type of GGUF has {blocks}{minimums}codes of {args.bits} bits"
    return next((each for each in fitting if each.bits >= args.bits), reason)
