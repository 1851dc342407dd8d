// Integers of BITS bits, 2 to 8, in consecutive bits of words: numbers without conversion.
//
// In the lowest bits of the pattern of 128 in bfloat16, or of 1,024 in float16, a code adds its own
// value; subtracting 128 plus the zero point is exact. 32 codes fill BITS whole words.
#pragma once

#include "numbers.cuh"

constexpr int DISTANCE = BITS == 8 ? 2 : BITS == 4 ? 4 : BITS == 2 ? 8 : 16;
constexpr u32 CODE = (1u << BITS) - 1;
constexpr u32 OFFSET = 1u << (BITS - 1);  // the code of zero without zero points
constexpr u32 MAGIC = BFLOAT ? 0x4300 : 0x6400;
constexpr bool WIDE = BFLOAT && BITS == 8;  // 128 + code does not fit into bfloat16

// The words of a chunk in the form from which pairs are unpacked.
//
// With 2, 4 and 8 bits the two codes of a pair are in the same word, 16 bits apart. Otherwise the
// codes i and i + 16 are 16 BITS bits apart: word k of the result has the bits from 16 k in its lower
// half, and those from 16 (k + BITS) in its upper half.
__device__ __forceinline__ void arrange(u32 (&arranged)[BITS], const u32 (&words)[BITS]) {
#pragma unroll
    for (int k = 0; k < BITS; k++) {
        if (DISTANCE < 16)
            arranged[k] = words[k];
        else
            arranged[k] = __byte_perm(words[k / 2], words[(k + BITS) / 2],
                                      (k % 2 ? 0x32 : 0x10) | ((k + BITS) % 2 ? 0x7600 : 0x5400));
    }
}

// Codes LOW and LOW + DISTANCE in the lowest bits of both halves of a word, with others above.
template <int LOW>
__device__ __forceinline__ u32 codes_of(const u32 (&arranged)[BITS]) {
    if constexpr (DISTANCE < 16) {
        constexpr int bit = LOW * BITS;
        return arranged[bit / 32] >> bit % 32;
    } else {
        constexpr int bit = LOW * BITS, word = bit / 16, shift = bit % 16;
        if constexpr (shift + BITS <= 16) {
            return arranged[word] >> shift;
        } else {
            constexpr u32 here = (1u << (16 - shift)) - 1;
            return (arranged[word] >> shift & doubled(here)) |
                   (arranged[word + 1] << (16 - shift) & doubled(CODE & ~here));
        }
    }
}

// The pattern of MAGIC in both halves of a register, of which the compiler does not know the value.
__device__ __forceinline__ u32 magic_register() {
    u32 magic;
    asm volatile("mov.b32 %0, %1;" : "=r"(magic) : "n"(doubled(MAGIC)));
    return magic;
}

// The codes LOW and LOW + DISTANCE as numbers, minus their zero points.
template <int LOW>
__device__ __forceinline__ u32 pair_of(
    const u32 (&arranged)[BITS], u32 magic, u32 low_zero, u32 high_zero) {
    if constexpr (WIDE) {
        // A byte in the lowest bits of the pattern of 2**23 in float32.
        const u32 word = arranged[LOW / 4];
        const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | LOW % 4));
        const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | (LOW % 4 + 2)));
        return both(low - (8388608 + (int)low_zero), high - (8388608 + (int)high_zero));
    } else {
        const u32 zero = doubled(MAGIC) + (low_zero | high_zero << 16);
        u32 number;  // codes & CODE | MAGIC: one instruction, of which one constant is a register
        asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
            : "=r"(number)
            : "r"(codes_of<LOW>(arranged)), "n"(doubled(CODE)), "r"(magic));
        return minus(number, zero);
    }
}

// Zero points are packed along the rows of the matrix: words [ceil(rows BITS / 32), groups].
__device__ __forceinline__ u32 zero_point(
    const u32* packed, int row, int group, int groups, int words) {
    const int bit = row * BITS, word = bit / 32, shift = bit % 32;
    const u32 first = __ldg(packed + (size_t)word * groups + group);
    u32 second = 0;
    if (shift + BITS > 32 && word + 1 < words)
        second = __ldg(packed + (size_t)(word + 1) * groups + group);
    return __funnelshift_r(first, second, shift) & CODE;
}
