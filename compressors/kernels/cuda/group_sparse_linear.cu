// Products of few tokens and a matrix of which some groups of GROUP columns are stored as integers.
//
// Macros besides those of few_tokens.cuh: BITS (2, 4 or 8) and GROUP (8, 16, or a multiple of 32).
// The mask has a bit per group; codes of the stored groups follow each other without gaps, row by
// row. A group's place is the number of bits before: of all rows before (`starts`), of the blocks of
// 64 groups before (`offsets`), and of its own block.

#include "codes.cuh"
#include "few_tokens.cuh"

constexpr int PIECE = GROUP < 32 ? GROUP : 32;  // columns of a group in a chunk
constexpr int PIECES = 32 / PIECE, WORDS = PIECE * BITS / 32;

struct GroupSparse {
    static constexpr int DISTANCE = ::DISTANCE;
    struct Chunk {
        u32 words[BITS], scales[PIECES];
        u32 low, high, before;  // mask and place of the block of 64 groups to be read next
    };

    const u32* packed;
    const u16* scale_of_group;
    const u32* masks;  // two words for 64 groups
    const int* starts;
    const OFFSETS* offsets;
    int d_in, blocks;

    __device__ __forceinline__ void start(Chunk& chunk, int row, int step) const {
        const int column = (step * 4 + threadIdx.x % 4) * 32, block = column / (64 * GROUP);
        if (column >= d_in) return;
        const uint2 mask = __ldg((const uint2*)masks + (size_t)row * blocks + block);
        chunk.low = mask.x, chunk.high = mask.y;
        chunk.before = __ldg(starts + row) + offsets[(size_t)row * blocks + block];
    }

    __device__ __forceinline__ void read(Chunk& chunk, int row, int step) const {
        const int column = (step * 4 + threadIdx.x % 4) * 32;
        if (column >= d_in) return;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int group = column / GROUP + i, bit = group % 64;
            const u32 half = bit < 32 ? chunk.low : chunk.high;
            const bool stored = half >> bit % 32 & 1;
            u32 place = chunk.before + __popc(half & ((1u << bit % 32) - 1));
            if (bit >= 32) place += __popc(chunk.low);
            u32* words = chunk.words + i * WORDS;
#pragma unroll
            for (int j = 0; j < WORDS; j++) words[j] = 0;
            chunk.scales[i] = 0;
            if (stored) {
                const u32* at = packed + (size_t)place * (GROUP * BITS / 32) + column % GROUP * BITS / 32;
                read_once<WORDS>(words, at);
                chunk.scales[i] = __ldg(scale_of_group + place);
            }
        }
        start(chunk, row, step + STAGES * WARPS);
    }

    __device__ __forceinline__ void unpack(
        const Chunk& chunk, int row, int step, u32 (&values)[16]) const {
        repeat<16>([&]<int PAIR>() {
            constexpr int LOW = low_of<DISTANCE>(PAIR);
            const u32 scale = doubled(chunk.scales[LOW / PIECE]);
            values[PAIR] = times(pair_of<LOW>(chunk.words, OFFSET, OFFSET), scale);
        });
    }

    __device__ __forceinline__ float scale(int) const { return 1; }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) product(
    const u16* __restrict__ x, const u32* __restrict__ packed, const u16* __restrict__ scales,
    const u32* __restrict__ masks, const int* __restrict__ starts,
    const OFFSETS* __restrict__ offsets, u16* __restrict__ y, int tokens, int d_out, int d_in,
    int blocks) {
    const GroupSparse matrix{packed, scales, masks, starts, offsets, d_in, blocks};
    multiply_few_tokens(matrix, x, y, tokens, d_out, d_in);
}
