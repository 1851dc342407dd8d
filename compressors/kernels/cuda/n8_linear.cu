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
    static constexpr int DISTANCE = 1;
    struct Chunk {
        u32 values[2 * N], mask;
    };

    const u32* values;
    const u32* masks;
    const uint2* selectors;
    int d_in;

    __device__ __forceinline__ void start(Chunk&, int, int) const {}

    __device__ __forceinline__ void read(Chunk& chunk, int row, int step) const {
        const int index = step * 4 + threadIdx.x % 4;
        if (index * 32 >= d_in) return;
        const size_t place = (size_t)row * (d_in / 32) + index;
        read_once<2 * N>(chunk.values, values + place * (2 * N));
        chunk.mask = __ldg(masks + place);
    }

    __device__ __forceinline__ void unpack(
        const Chunk& chunk, int row, int step, u32 (&pairs)[16]) const {
        repeat<4>([&]<int UNIT>() {
            const u32 byte = chunk.mask >> (8 * UNIT) & 0xFF;
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
                pairs[4 * UNIT + P] =
                    __byte_perm(low, high, P % 2 ? chosen >> 16 : chosen & 0xFFFF) & exist;
            });
        });
    }

    __device__ __forceinline__ float scale(int) const { return 1; }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) product(
    const u16* __restrict__ x, const u32* __restrict__ values, const u32* __restrict__ masks,
    u16* __restrict__ y, int tokens, int d_out, int d_in) {
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
    multiply_few_tokens(EightOf{values, masks, selectors, d_in}, x, y, tokens, d_out, d_in);
}
