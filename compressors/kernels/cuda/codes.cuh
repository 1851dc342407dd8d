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

// Code INDEX of the words is in the lowest bits, with others above.
template <int INDEX>
__device__ __forceinline__ u32 shifted(const u32* words) {
    constexpr int bit = INDEX * BITS, word = bit / 32, shift = bit % 32;
    if constexpr (shift + BITS <= 32)
        return words[word] >> shift;
    else
        return __funnelshift_r(words[word], words[word + 1], shift);
}

// The codes LOW and LOW + DISTANCE of the words as numbers, minus their zero points.
template <int LOW>
__device__ __forceinline__ u32 pair_of(const u32* words, u32 low_zero, u32 high_zero) {
    if constexpr (WIDE) {
        // A byte in the lowest bits of the pattern of 2**23 in float32.
        const u32 word = words[LOW / 4];
        const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | LOW % 4));
        const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | (LOW % 4 + 2)));
        return both(low - (8388608 + (int)low_zero), high - (8388608 + (int)high_zero));
    } else {
        u32 codes;
        if constexpr (DISTANCE < 16)  // both are in one word
            codes = shifted<LOW>(words);
        else
            codes = __byte_perm(shifted<LOW>(words), shifted<LOW + DISTANCE>(words), 0x5410);
        const u32 zero = doubled(MAGIC) + (low_zero | high_zero << 16);
        return minus((codes & doubled(CODE)) | doubled(MAGIC), zero);
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
