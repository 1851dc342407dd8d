// Products of few tokens and a matrix with N of every eight columns, N from 1 to 7.
//
// Columns 2 p and 2 p + 1 of eight can only have the values first(p) to first(p) + 3, because 8 - N
// columns are empty. So one byte permutation makes a pair from two registers; which of the bytes
// depends on the mask alone, and comes from a table in shared memory.

#include "few_tokens.cuh"

// The smallest number of values before column 2 p.
__device__ __forceinline__ constexpr int first_value(int p) {
    return 2 * p > 8 - N ? 2 * p - (8 - N) : 0;
}

struct EightOf {
    static constexpr int DISTANCE = 1, PIECE = N == 4 ? 16 : 32;
    static constexpr int PIECES = 32 / PIECE, WORDS = PIECE * N / 16;  // of a piece
    static constexpr bool WHOLE = true;
    struct Row {
        u32 next;  // column of the matrix, as one row, of the first piece that is read next
    };
    struct Chunk {
        u32 values[2 * N];
        u16 masks[2];  // of 16 columns each
    };

    const u32* values;
    const u16* masks;
    const uint2* selectors;
    int d_in;

    __device__ __forceinline__ Row row(int index) const {
        return {(u32)index * d_in + threadIdx.x / 32 * 128 + threadIdx.x % 4 * PIECE};
    }

    __device__ __forceinline__ void start(Chunk& chunk, Row&, int) const {
#pragma unroll
        for (int i = 0; i < 2 * N; i++) chunk.values[i] = 0;
        chunk.masks[0] = chunk.masks[1] = 0;
    }

    __device__ __forceinline__ void read(Chunk& chunk, Row& row, int step) const {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const bool exists = column_of<PIECE>(step, i * PIECE) < d_in;
            const u32 first = row.next + i * 4 * PIECE;
            read_words<WORDS>(chunk.values + i * WORDS, values + first / 16 * N, exists);
#pragma unroll
            for (int j = 0; j < 2 / PIECES; j++)
                read_half(chunk.masks[i + j], masks + first / 16 + j, exists);
        }
        row.next += WARPS * 128;
    }

    __device__ __forceinline__ void unpack(
        const Chunk& chunk, const Row&, int, u32 (&pairs)[16]) const {
        repeat<4>([&]<int UNIT>() {
            const u32 byte = chunk.masks[UNIT / 2] >> UNIT % 2 * 8 & 0xFF;
            const uint2 selector = selectors[byte];
            const u32 spread = byte | byte << 15;  // bits 0 and 16: columns 0 and 1
            repeat<4>([&]<int P>() {
                constexpr int first = UNIT * N + first_value(P), word = first / 2;
                constexpr int last = 2 * N - 1;
                u32 low = chunk.values[word], high = chunk.values[word < last ? word + 1 : last];
                if constexpr (first % 2 == 1) {
                    const u32 more = chunk.values[word + 1 < last ? word + 2 : last];
                    low = __funnelshift_r(low, high, 16);
                    high = __funnelshift_r(high, more, 16);
                }
                const u32 chosen = P < 2 ? selector.x : selector.y;
                const u32 exist = (spread >> 2 * P & 0x00010001) * 0xFFFF;
                pairs[4 * UNIT + P] = __byte_perm(low, high, chosen >> P % 2 * 16) & exist;
            });
        });
    }

    __device__ __forceinline__ float scale(int) const { return 1; }
};

struct Stored {
    const u32* values;
    const u16* masks;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    product(const __grid_constant__ Arguments<Stored> arguments) {
    __shared__ uint2 selectors[256];
    for (int byte = threadIdx.x; byte < 256; byte += WARPS * 32) {
        u32 found[4];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const int before = __popc(byte & ((1 << 2 * p) - 1)) - first_value(p);
            const int low = min(max(before, 0), 3);
            const int high = min(max(before + (byte >> 2 * p & 1), 0), 3);
            found[p] = 0x10 + low * 0x22 | (0x10 + high * 0x22) << 8;
        }
        selectors[byte] = make_uint2(found[0] | found[1] << 16, found[2] | found[3] << 16);
    }
    __syncthreads();
    int block;
    const auto& member = member_of_block(arguments, block);
    const int d_in = arguments.d_in;
    const EightOf matrix{member.stored.values, member.stored.masks, selectors, d_in};
    multiply_few_tokens(
        matrix, arguments.x, member.y, arguments.tokens, member.d_out, d_in, block);
}
