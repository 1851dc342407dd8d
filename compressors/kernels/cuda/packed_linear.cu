// Products of few tokens and a matrix of packed integers, in the layout of the stored words.
//
// Macros besides those of few_tokens.cuh:
//   BITS        2 to 8
//   GROUP       columns that share a scale; 0 for one scale per row
//   ASYMMETRIC  1 if there are zero points

#include "codes.cuh"
#include "few_tokens.cuh"

constexpr bool GROUPED = GROUP > 0;
constexpr int DIVISOR = GROUPED ? GROUP : 1;
constexpr bool PER_CODE = GROUP % 32 != 0;  // a chunk can belong to several groups

struct PackedIntegers {
    static constexpr int DISTANCE = ::DISTANCE;
    struct Chunk {
        u32 words[BITS], scale, zero;
    };

    const u32* packed;
    const u16* scales;
    const u32* zero_points;
    int d_in, words, groups, zero_words;

    __device__ __forceinline__ void start(Chunk&, int, int) const {}

    __device__ __forceinline__ void read(Chunk& chunk, int row, int step) const {
        const int index = step * 4 + threadIdx.x % 4, group = index * 32 / DIVISOR;
        if (index * 32 >= d_in) return;
        const u32* at = packed + (size_t)row * words + index * BITS;
#if ALIGNED
        read_once<BITS>(chunk.words, at);
#else
#pragma unroll
        for (int i = 0; i < BITS; i++) chunk.words[i] = index * BITS + i < words ? __ldg(at + i) : 0;
#endif
        if (GROUPED && !PER_CODE) {
            chunk.scale = __ldg(scales + (size_t)row * groups + group);
            if (ASYMMETRIC) chunk.zero = zero_point(zero_points, row, group, groups, zero_words);
        } else if (ASYMMETRIC && !GROUPED) {
            chunk.zero = zero_point(zero_points, row, 0, groups, zero_words);
        }
    }

    __device__ __forceinline__ void unpack(
        const Chunk& chunk, int row, int step, u32 (&values)[16]) const {
        repeat<16>([&]<int PAIR>() {
            constexpr int LOW = low_of<DISTANCE>(PAIR);
            if constexpr (GROUPED && PER_CODE) {
                const int column = (step * 4 + threadIdx.x % 4) * 32 + LOW;
                const int low = min(column, d_in - 1) / DIVISOR;
                const int high = min(column + DISTANCE, d_in - 1) / DIVISOR;
                u32 low_zero = OFFSET, high_zero = OFFSET;
                if (ASYMMETRIC) {
                    low_zero = zero_point(zero_points, row, low, groups, zero_words);
                    high_zero = zero_point(zero_points, row, high, groups, zero_words);
                }
                const u16* of_row = scales + (size_t)row * groups;
                const u32 scale = __ldg(of_row + low) | (u32)__ldg(of_row + high) << 16;
                values[PAIR] = times(pair_of<LOW>(chunk.words, low_zero, high_zero), scale);
            } else {
                const u32 zero = ASYMMETRIC ? chunk.zero : OFFSET;
                const u32 pair = pair_of<LOW>(chunk.words, zero, zero);
                values[PAIR] = GROUPED ? times(pair, doubled(chunk.scale)) : pair;
            }
        });
    }

    __device__ __forceinline__ float scale(int row) const {
        return GROUPED ? 1.0f : number(__ldg(scales + row));
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) product(
    const u16* __restrict__ x, const u32* __restrict__ packed, const u16* __restrict__ scales,
    const u32* __restrict__ zero_points, u16* __restrict__ y, int tokens, int d_out, int d_in,
    int words, int groups, int zero_words) {
    const PackedIntegers matrix{packed, scales, zero_points, d_in, words, groups, zero_words};
    multiply_few_tokens(matrix, x, y, tokens, d_out, d_in);
}
