// Products of few tokens and a matrix of which some groups of GROUP columns are stored as integers.
//
// Macros besides those of few_tokens.cuh: BITS (2, 4 or 8), GROUP (8, 16, or a multiple of 32), and
// OFFSETS, the type of the offsets. The mask has a bit per group; codes of the stored groups follow
// each other without gaps, row by row. A group's place is the number of bits before: of all rows
// before (`starts`), of the blocks of 64 groups before (`offsets`), and of its own block.

#include "codes.cuh"
#include "few_tokens.cuh"

constexpr int COLUMNS = GROUP < 32 ? GROUP : 32;  // of a group in a chunk
constexpr int PARTS = 32 / COLUMNS, WORDS = COLUMNS * BITS / 32;

struct GroupSparse {
    static constexpr int DISTANCE = ::DISTANCE, PIECE = 32;
    static constexpr bool WHOLE = true;
    struct Row {
        u32 blocks, start;
    };
    struct Chunk {
        u32 words[BITS];
        u16 scales[PARTS];      // zero for what is not stored, so that the codes do not matter
        u32 low, high, before;  // mask and place of the block of 64 groups to be read next
    };

    const u32* packed;
    const u16* scale_of_group;
    const uint2* masks;  // of 64 groups each
    const int* starts;
    const OFFSETS* offsets;
    int d_in, blocks;
    u32 magic;

    __device__ __forceinline__ Row row(int index) const {
        return {(u32)index * blocks, (u32)__ldg(starts + index)};
    }

    __device__ __forceinline__ void start(Chunk& chunk, Row& row, int step) const {
#pragma unroll
        for (int i = 0; i < BITS; i++) chunk.words[i] = 0;
        find_block(chunk, row, step);
    }

    __device__ __forceinline__ void find_block(Chunk& chunk, Row& row, int step) const {
        const int column = column_of<PIECE>(step, 0);
        const bool exists = column < d_in;
        const u32 block = row.blocks + (exists ? column / (64 * GROUP) : 0);
        const uint2 mask = __ldg(masks + block);
        chunk.low = exists ? mask.x : 0;
        chunk.high = exists ? mask.y : 0;
        chunk.before = row.start + __ldg(offsets + block);
    }

    __device__ __forceinline__ void read(Chunk& chunk, Row& row, int step) const {
        const int column = column_of<PIECE>(step, 0), bit = column / GROUP % 64;
        // The groups of a chunk are in the same half of the mask.
        const u32 half = bit < 32 ? chunk.low : chunk.high;
        u32 place = chunk.before + (bit < 32 ? 0 : __popc(chunk.low));
        place += __popc(half & ((1u << bit % 32) - 1));
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const bool exists = half >> (bit % 32 + i) & 1;
            read_words<WORDS>(chunk.words + i * WORDS,
                              packed + (place * (GROUP * BITS / 32) + column % GROUP * BITS / 32),
                              exists);
            chunk.scales[i] = 0;
            read_half(chunk.scales[i], scale_of_group + place, exists);
            place += exists;
        }
        find_block(chunk, row, step + STAGES * WARPS);
    }

    __device__ __forceinline__ void unpack(
        const Chunk& chunk, const Row&, int, u32 (&values)[16]) const {
        u32 arranged[BITS];
        arrange(arranged, chunk.words);
        repeat<16>([&]<int PAIR>() {
            constexpr int LOW = low_of<DISTANCE>(PAIR);
            const u32 pair = pair_of<LOW>(arranged, magic, OFFSET, OFFSET);
            values[PAIR] = times(pair, doubled(chunk.scales[LOW / COLUMNS]));
        });
    }

    __device__ __forceinline__ float scale(int) const { return 1; }
};

struct Stored {
    const u32* packed;
    const u16* scales;
    const uint2* masks;
    const int* starts;
    const OFFSETS* offsets;
    long long blocks;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    product(const __grid_constant__ Arguments<Stored> arguments) {
    int block;
    const auto& member = member_of_block(arguments, block);
    const Stored& s = member.stored;
    const int d_in = arguments.d_in;
    const GroupSparse matrix{s.packed,  s.scales, s.masks,       s.starts,
                             s.offsets, d_in,     (int)s.blocks, magic_register()};
    multiply_few_tokens(
        matrix, arguments.x, member.y, arguments.tokens, member.d_out, d_in, block);
}
