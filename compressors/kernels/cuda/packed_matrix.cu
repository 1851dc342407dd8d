// Write the matrix [d_out, d_in] that packed integers stand for; a thread writes eight columns.
// The macros are those of packed_linear.cu.

#include "codes.cuh"

constexpr int DIVISOR = GROUP > 0 ? GROUP : 1;

extern "C" __global__ void __launch_bounds__(256) matrix(
    const u32* __restrict__ packed, const u16* __restrict__ scales,
    const u32* __restrict__ zero_points, u16* __restrict__ out, int d_out, int d_in, int words,
    int groups, int zero_words) {
    const int row = blockIdx.x, column = 8 * (blockIdx.y * 256 + threadIdx.x);
    if (column >= d_in) return;
    // Eight codes are BITS bytes, which start anywhere in a word.
    const u32* line = packed + (size_t)row * words;
    const int bit = column * BITS, word = bit / 32, shift = bit % 32;
    u32 read[3] = {__ldg(line + word), 0, 0};
    if (shift + 8 * BITS > 32 && word + 1 < words) read[1] = __ldg(line + word + 1);
    if (shift + 8 * BITS > 64 && word + 2 < words) read[2] = __ldg(line + word + 2);
    const u64 codes = (u64)__funnelshift_r(read[1], read[2], shift) << 32 |
                      __funnelshift_r(read[0], read[1], shift);
    const u16* of_row = scales + (size_t)row * groups;
    float scale = 0, zero = 0;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i == 0 || GROUP % 8 != 0) {
            const int group = GROUP > 0 ? min(column + i, d_in - 1) / DIVISOR : 0;
            scale = number(__ldg(of_row + group));
            zero = OFFSET;
            if (ASYMMETRIC) zero = zero_point(zero_points, row, group, groups, zero_words);
        }
        const u32 code = (u32)(codes >> i * BITS) & CODE;
        values[i] = (__uint_as_float(0x4B000000u | code) - (8388608 + zero)) * scale;
    }
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = both(values[2 * i], values[2 * i + 1]);
    u16* at = out + (size_t)row * d_in + column;
    if (d_in % 8 == 0) {
        *(uint4*)at = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (column + i < d_in) at[i] = (u16)(pairs[i / 2] >> 16 * (i % 2));
    }
}
