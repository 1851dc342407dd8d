"""Triton functions that read eight consecutive entries of sparse rows.

A thread reads what belongs to its unit of eight columns in a few words, whose number does not
depend on the mask, and then takes one value for every bit. Reading value by value needs an address
and a predicate for each, and leaves few reads in flight.

The hints `max_contiguous` and `multiple_of` are not true, and make all loads have the same layout:
one unit a thread, and neighbouring threads along a row. The compiler lets threads follow the
dimension that is contiguous, and reads as much at once as is aligned, of which it then knows
nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
import triton
import triton.language as tl

from lrc.compressors.kernels import shift_out
from lrc.compressors.kernels.bits_triton import count_bits

ENTRIES = tl.constexpr(shift_out.ENTRIES)
ENTRIES_OPERANDS = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 7))
PRODUCT_BF16 = tl.constexpr(shift_out.PRODUCT_BF16)
PRODUCT_FP16 = tl.constexpr(shift_out.PRODUCT_FP16)
# The result is written before the last input is read.
PRODUCT_OPERANDS = tl.constexpr(",".join(["=&f"] + ["f"] * 9 + ["r"] * 7))


@triton.jit
def words_of(values, m, place, ASM: tl.constexpr):
    """Return the five words that hold the 16-bit values of a unit, and the bits before them.

    The last word that is read may hold half a word that is no value of the unit, nor perhaps of
    any; it is never taken.
    """
    odd = place & 1
    word = tl.max_contiguous(tl.multiple_of(place >> 1, [1, 1]), [1, 2])
    words = values.to(tl.pointer_type(tl.int32)) + word
    needed = odd + count_bits(m, ASM)
    w0 = tl.load(words, needed > 0, other=0)
    w1 = tl.load(words + 1, needed > 2, other=0)
    w2 = tl.load(words + 2, needed > 4, other=0)
    w3 = tl.load(words + 3, needed > 6, other=0)
    w4 = tl.load(words + 4, needed > 8, other=0)
    return w0, w1, w2, w3, w4, odd * 16


@triton.jit
def unit(
    mask,
    starts,  # [R, 1]
    offsets,
    rows,  # [R, 1]
    units,  # [1, G]
    exists,  # [R, G]
    mask_stride,
    offsets_stride,
    LAYOUT: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the masks of units, lowest bit first, and the places of their first values."""
    if LAYOUT == 0:
        at = tl.max_contiguous(tl.multiple_of(rows * mask_stride + units, [1, 1]), [1, 2])
        bits = tl.load(mask + at, exists, other=0).to(tl.int32)
        place = (rows * mask_stride + units) * N
    else:
        # A bit of the mask is a column, or a group of columns of which a unit is a part.
        per_group: tl.constexpr = GROUP // 8 if LAYOUT == 2 else 1
        bit = units // per_group if LAYOUT == 2 else units * 8
        bits, place = _bits_from(
            mask, starts, offsets, rows, bit, exists, mask_stride, offsets_stride, ALIGNED, ASM
        )
        if LAYOUT == 2:
            bits = tl.where(exists & ((bits & 1) != 0), 255, 0)
            place = place * GROUP + (units % per_group) * 8
        else:
            bits = bits & 255
    return bits, place


@triton.jit
def _bits_from(
    mask,
    starts,
    offsets,
    rows,
    bit,  # [1, G]
    exists,
    mask_stride,
    offsets_stride,
    ALIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the bits of rows from `bit` on, and the number of bits before it in the mask."""
    block = tl.max_contiguous(tl.multiple_of(rows * offsets_stride + bit // 64, [1, 1]), [1, 2])
    place = starts + tl.load(offsets + block, exists, other=0)
    if ALIGNED:
        at = tl.max_contiguous(
            tl.multiple_of(rows * (mask_stride // 8) + bit // 64, [1, 1]), [1, 2]
        )
        word = tl.load(mask.to(tl.pointer_type(tl.int64)) + at, exists, other=0)
        low = word.to(tl.int32)
        high = (word >> 32).to(tl.int32)
        shift = bit & 31
        below = (1 << shift) - 1
        upper = (bit & 32) != 0
        place += count_bits(low & tl.where(upper, -1, below), ASM)
        place += count_bits(high & tl.where(upper, below, 0), ASM)
        bits = tl.where(upper, high, low) >> shift
    else:
        at = tl.max_contiguous(tl.multiple_of(rows * mask_stride + bit // 8, [1, 1]), [1, 2])
        start = mask + at
        byte = tl.load(start, exists, other=0).to(tl.int32)
        for before in tl.static_range(1, 8):
            inside = exists & (((bit // 8) & 7) >= before)
            place += count_bits(tl.load(start - before, inside, other=0).to(tl.int32), ASM)
        place += count_bits(byte & ((1 << (bit & 7)) - 1), ASM)
        bits = byte >> (bit & 7)
    return bits, place


@triton.jit
def entries(
    values,
    scale,
    m,  # [R, G], as of `unit`
    place,  # [R, G]
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the eight entries of each unit, each [R, G], with zeros."""
    if BITS > 0:
        e0, e1, e2, e3, e4, e5, e6, e7 = _packed_entries(
            values, scale, m, place, LAYOUT, BITS, GROUP, ASM
        )
    elif ASM and values.dtype.element_ty.primitive_bitwidth == 16:
        w0, w1, w2, w3, w4, shift = words_of(values, m, place, ASM)
        e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
            ENTRIES,
            ENTRIES_OPERANDS,
            [w0, w1, w2, w3, w4, m, shift],
            dtype=(
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
        dtype: tl.constexpr = values.dtype.element_ty
        e0 = e0.to(dtype, bitcast=True)
        e1 = e1.to(dtype, bitcast=True)
        e2 = e2.to(dtype, bitcast=True)
        e3 = e3.to(dtype, bitcast=True)
        e4 = e4.to(dtype, bitcast=True)
        e5 = e5.to(dtype, bitcast=True)
        e6 = e6.to(dtype, bitcast=True)
        e7 = e7.to(dtype, bitcast=True)
    else:
        e0, place = _entry(values, place, (m & 1) != 0)
        e1, place = _entry(values, place, (m & 2) != 0)
        e2, place = _entry(values, place, (m & 4) != 0)
        e3, place = _entry(values, place, (m & 8) != 0)
        e4, place = _entry(values, place, (m & 16) != 0)
        e5, place = _entry(values, place, (m & 32) != 0)
        e6, place = _entry(values, place, (m & 64) != 0)
        e7, place = _entry(values, place, (m & 128) != 0)
    return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit
def _entry(values, place, stored):
    at = tl.max_contiguous(tl.multiple_of(place + 0, [1, 1]), [1, 2])
    return tl.load(values + at, stored, other=0.0), tl.where(stored, place + 1, place)


@triton.jit
def _packed_entries(
    values,
    scale,
    m,
    place,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return entries that are stored as integers, rounded to the dtype of the scales."""
    count = count_bits(m, ASM)
    # The last codes of a matrix may end before the words of a whole unit.
    codes = _codes_of(values, place, count, BITS)
    stored = m != 0
    group = tl.max_contiguous(tl.multiple_of(place // GROUP, [1, 1]), [1, 2])
    s0 = tl.load(scale + group, stored, other=0.0).to(tl.float32)
    s1 = s0
    left = place * 0 + 8
    if LAYOUT != 2:  # the values of a unit have at most two scales, if a scale has 8 values or more
        left = (group + 1) * GROUP - place  # values with the first scale
        s1 = tl.load(scale + group + 1, stored & (count > left), other=0.0).to(tl.float32)
    dtype: tl.constexpr = scale.dtype.element_ty
    e0, codes, left = _packed_entry(codes, s0, s1, left, (m & 1) != 0, dtype, BITS)
    e1, codes, left = _packed_entry(codes, s0, s1, left, (m & 2) != 0, dtype, BITS)
    e2, codes, left = _packed_entry(codes, s0, s1, left, (m & 4) != 0, dtype, BITS)
    e3, codes, left = _packed_entry(codes, s0, s1, left, (m & 8) != 0, dtype, BITS)
    e4, codes, left = _packed_entry(codes, s0, s1, left, (m & 16) != 0, dtype, BITS)
    e5, codes, left = _packed_entry(codes, s0, s1, left, (m & 32) != 0, dtype, BITS)
    e6, codes, left = _packed_entry(codes, s0, s1, left, (m & 64) != 0, dtype, BITS)
    e7, codes, left = _packed_entry(codes, s0, s1, left, (m & 128) != 0, dtype, BITS)
    return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit
def _codes_of(values, place, count, BITS: tl.constexpr):
    """Return the 64 bits from code `place` on, of which the lowest hold `count` codes."""
    first = (place & 31) * BITS
    word = tl.max_contiguous(tl.multiple_of((place >> 5) * BITS + (first >> 5), [1, 1]), [1, 2])
    words = values + word
    shift = (first & 31).to(tl.uint64)
    end = (first & 31) + count * BITS
    w0 = tl.load(words, count > 0, other=0).to(tl.uint32).to(tl.uint64)
    w1 = tl.load(words + 1, end > 32, other=0).to(tl.uint32).to(tl.uint64)
    out = (w0 | (w1 << 32)) >> shift
    if BITS > 4:
        w2 = tl.load(words + 2, end > 64, other=0).to(tl.uint32).to(tl.uint64)
        # A shift by 64 is undefined; without a shift, w2 is zero.
        out |= w2 << ((64 - shift) & 63)
    return out


@triton.jit
def _packed_entry(codes, s0, s1, left, stored, dtype: tl.constexpr, BITS: tl.constexpr):
    """Return one entry; the codes and the number of values with the first scale after it."""
    step = (codes & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))
    size = tl.where(left > 0, s0, s1)
    # Rounded once, like the product of a code and a scale in the dtype of the scale.
    entry = tl.where(stored, step.to(tl.float32) * size, 0.0).to(dtype)
    codes = tl.where(stored, codes >> BITS, codes)
    return entry, codes, tl.where(stored, left - 1, left)


@triton.jit
def group_products(
    values, scale, m, place, x0, x1, x2, x3, x4, x5, x6, x7, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """Return the products [T, R, G] of units of groups with inputs [T, 1, G], in float32.

    A group is stored or not, so that the bits of a unit need not be told apart.
    """
    stored = m != 0
    unit_place = tl.max_contiguous(tl.multiple_of(place // 8, [1, 1]), [1, 2])
    group = tl.max_contiguous(tl.multiple_of(place // GROUP, [1, 1]), [1, 2])
    size = tl.load(scale + group, stored, other=0.0).to(tl.float32)  # 0: nothing is stored
    if BITS == 4:
        # Codes stay where they are if 2**23 + 15 * 16**k is a float32; inputs are scaled instead.
        word = tl.load(values + unit_place, stored, other=0)
        total = _nibble(word, 0)[None] * x0
        total += _nibble(word, 1)[None] * (x1 * 2.0**-4)
        total += _nibble(word, 2)[None] * (x2 * 2.0**-8)
        total += _nibble(word, 3)[None] * (x3 * 2.0**-12)
        total += _nibble(word, 4)[None] * (x4 * 2.0**-16)
        word = word >> 20
        total += _nibble(word, 0)[None] * x5
        total += _nibble(word, 1)[None] * (x6 * 2.0**-4)
        total += _nibble(word, 2)[None] * (x7 * 2.0**-8)
    else:
        if BITS == 8:
            pairs = values.to(tl.pointer_type(tl.int64))
            codes = tl.load(pairs + unit_place, stored, other=0).to(tl.uint64)
        else:
            codes = _codes_of(values, place, tl.where(stored, 8, 0), BITS)
        total = _step(codes, 0, BITS)[None] * x0
        total += _step(codes, 1, BITS)[None] * x1
        total += _step(codes, 2, BITS)[None] * x2
        total += _step(codes, 3, BITS)[None] * x3
        total += _step(codes, 4, BITS)[None] * x4
        total += _step(codes, 5, BITS)[None] * x5
        total += _step(codes, 6, BITS)[None] * x6
        total += _step(codes, 7, BITS)[None] * x7
    return total * size[None]


@triton.jit
def _nibble(word, k: tl.constexpr):
    """Return 16**k times the signed code in bits 4 k to 4 k + 3, in float32."""
    code = (word & (15 << (4 * k))) | 0x4B000000
    return code.to(tl.float32, bitcast=True) - (8388608.0 + 8 * 16**k)


@triton.jit
def _step(codes, k: tl.constexpr, BITS: tl.constexpr):
    """Return signed code k in float32: the code becomes the last bits of 2**23 + code."""
    code = (codes >> (k * BITS)).to(tl.int32) & ((1 << BITS) - 1)
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))
