"""Triton functions of the sparse kernels: 16-bit halves, permuted bytes, counted bits."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl


@triton.jit
def low_half(pair, dtype: tl.constexpr):
    """Return the 16-bit number in the low half of int32 words, in float32."""
    if dtype == tl.bfloat16:  # the upper half of a float32 with the same value
        return (pair << 16).to(tl.float32, bitcast=True)
    return (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def high_half(pair, dtype: tl.constexpr):
    """Return the 16-bit number in the high half of int32 words, in float32."""
    if dtype == tl.bfloat16:
        return (pair & -65536).to(tl.float32, bitcast=True)
    return (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def permute_bytes(a, b, selector, ASM: tl.constexpr):
    """Return int32 words whose byte i is byte ``selector[4i : 4i + 3]`` of the eight of a and b."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, selector],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    both = (b.to(tl.int64) << 32) | (a.to(tl.int64) & 0xFFFFFFFF)
    out = ((both >> ((selector & 7) * 8).to(tl.int64)) & 0xFF).to(tl.int32)
    for i in tl.static_range(1, 4):
        place = (((selector >> (4 * i)) & 7) * 8).to(tl.int64)
        out |= ((both >> place) & 0xFF).to(tl.int32) << (8 * i)
    return out


@triton.jit
def count_bits(word, ASM: tl.constexpr):
    """Return the number of bits set in int32 words."""
    if ASM:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    word = word.to(tl.uint32)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def split_eight(tile):
    """Return the eight tensors [..., i] of a tile [A, B, 8], without leaving registers."""
    tile = tl.reshape(tile, [tile.shape[0], tile.shape[1], 2, 2, 2])
    even, odd = tl.split(tile)  # [A, B, 2, 2]
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join_eight(x0, x1, x2, x3, x4, x5, x6, x7):
    """Return the tile [A, B, 8] of eight tensors [A, B]."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))  # [A, B, 2, 2]
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), [x0.shape[0], x0.shape[1], 8])
