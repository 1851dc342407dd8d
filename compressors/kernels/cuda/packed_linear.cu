// Products of few tokens and a matrix of packed integers, in the layout of the stored words.
//
// Macros besides those of few_tokens.cuh:
//   BITS        2 to 8
//   GROUP       columns that share a scale; 0 for one scale per row
//   ASYMMETRIC  1 if there are zero points
//   ALIGNED     1 if columns are a multiple of 32, and all tensors start at multiples of 16 bytes

#include "codes.cuh"
#include "few_tokens.cuh"

constexpr bool GROUPED = GROUP > 0;
constexpr int DIVISOR = GROUPED ? GROUP : 1;
constexpr bool PER_CODE = GROUP % 32 != 0;  // a piece can belong to several groups

struct PackedIntegers {
    static constexpr int DISTANCE = ::DISTANCE, PIECE = BITS == 8 ? 16 : 32;
    static constexpr int PIECES = 32 / PIECE, WORDS = PIECE * BITS / 32;  // of a piece
    static constexpr bool WHOLE = ALIGNED;
    struct Row {
        u32 next;  // word of the first piece that is read next
        u32 scales;
        int index;
    };
    struct Chunk {
        u32 words[BITS];
        u16 scales[PIECES];
        u32 zeros[PIECES];
    };

    const u32* packed;
    const u16* scales;
    const u32* zero_points;
    int d_in, words, groups, zero_words;
    u32 magic;

    __device__ __forceinline__ Row row(int index) const {
        const u32 piece = threadIdx.x / 32 * 4 * PIECES + threadIdx.x % 4;
        return {(u32)index * words + piece * WORDS, (u32)index * groups, index};
    }

    __device__ __forceinline__ void start(Chunk& chunk, Row& row, int) const {
#pragma unroll
        for (int i = 0; i < BITS; i++) chunk.words[i] = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            chunk.scales[i] = 0;
            chunk.zeros[i] = !GROUPED && ASYMMETRIC
                                 ? zero_point(zero_points, row.index, 0, groups, zero_words)
                                 : OFFSET;
        }
    }

    __device__ __forceinline__ void read(Chunk& chunk, Row& row, int step) const {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int column = column_of<PIECE>(step, i * PIECE);
            const bool exists = column < d_in;
            const u32 first = row.next + i * 4 * WORDS;
            if (ALIGNED) {
                read_words<WORDS>(chunk.words + i * WORDS, packed + first, exists);
            } else {
                const int left = words - column / PIECE * WORDS;
#pragma unroll
                for (int j = 0; j < WORDS; j++)
                    chunk.words[i * WORDS + j] = j < left ? __ldg(packed + first + j) : 0;
            }
            if (GROUPED && !PER_CODE) {
                const int group = column / DIVISOR;
                read_half(chunk.scales[i], scales + (row.scales + group), exists);
                if (ASYMMETRIC && exists)
                    chunk.zeros[i] = zero_point(zero_points, row.index, group, groups, zero_words);
            }
        }
        row.next += WARPS * 4 * BITS;
    }

    __device__ __forceinline__ void unpack(
        const Chunk& chunk, const Row& row, int step, u32 (&values)[16]) const {
        u32 arranged[BITS];
        arrange(arranged, chunk.words);
        repeat<16>([&]<int PAIR>() {
            constexpr int LOW = low_of<DISTANCE>(PAIR);
            if constexpr (GROUPED && PER_CODE) {
                const int column = column_of<PIECE>(step, LOW);
                const int low = min(column, d_in - 1) / DIVISOR;
                const int high = min(column + DISTANCE, d_in - 1) / DIVISOR;
                u32 low_zero = OFFSET, high_zero = OFFSET;
                if (ASYMMETRIC) {
                    low_zero = zero_point(zero_points, row.index, low, groups, zero_words);
                    high_zero = zero_point(zero_points, row.index, high, groups, zero_words);
                }
                const u32 scale = __ldg(scales + (row.scales + low)) |
                                  (u32)__ldg(scales + (row.scales + high)) << 16;
                values[PAIR] = times(pair_of<LOW>(arranged, magic, low_zero, high_zero), scale);
            } else {
                const u32 zero = ASYMMETRIC ? chunk.zeros[LOW / PIECE] : OFFSET;
                const u32 pair = pair_of<LOW>(arranged, magic, zero, zero);
                values[PAIR] = GROUPED ? times(pair, doubled(chunk.scales[LOW / PIECE])) : pair;
            }
        });
    }

    __device__ __forceinline__ float scale(int index) const {
        return GROUPED ? 1.0f : number(__ldg(scales + index));
    }
};

struct Stored {
    const u32* packed;
    const u16* scales;
    const u32* zero_points;
    long long words, groups, zero_words;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    product(const __grid_constant__ Arguments<Stored> arguments) {
    int block;
    const auto& member = member_of_block(arguments, block);
    const Stored& s = member.stored;
    const int d_in = arguments.d_in;
    const PackedIntegers matrix{s.packed,      s.scales,      s.zero_points,     d_in,
                                (int)s.words, (int)s.groups, (int)s.zero_words, magic_register()};
    multiply_few_tokens(
        matrix, arguments.x, member.y, arguments.tokens, member.d_out, d_in, block);
}
