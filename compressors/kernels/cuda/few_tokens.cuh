// The product of few rows of inputs, the tokens, and a matrix that is unpacked in registers.
//
// Needs these macros besides BFLOAT:
//   ALIGNED  1 if rows of inputs are a multiple of 32 columns and start at multiples of 16 bytes
//   TOKENS   tokens per block: 8, 16, 32 or 64
//   TILES    tiles of 8 rows of the matrix per block
//   WARPS    warps per block, which share the columns
//   STAGES   chunks that a thread reads ahead
//
// A *chunk* is 32 consecutive columns of a row. A tensor core multiplies 16 columns at a time, of
// 16 tokens and 8 rows, and a sum over columns may be taken in any order: every thread unpacks
// whole chunks, and the numbers are used in the order in which they come. Threads 4 g to 4 g + 3
// of a warp hold four neighbouring chunks of row g, and those of the tokens g and g + 8.
//
// The type Matrix, which the kernel's file defines, describes what is stored:
//   DISTANCE                 columns between the two numbers of a pair: number 2 DISTANCE i + j of
//                            a chunk is with the one DISTANCE further, for j < DISTANCE
//   Chunk                    the registers of a chunk that is read ahead
//   start(chunk, row, step)  called before the first read; four chunks are a step
//   read(chunk, row, step)   request a chunk
//   unpack(chunk, row, step, values)  make 16 pairs of it; zeros or anything where columns end
//   scale(row)               factor of the sums of a row
#pragma once

#include "numbers.cuh"

constexpr int BLOCKS_OF_TOKENS = TOKENS < 16 ? 1 : TOKENS / 16;
constexpr int HALVES = TOKENS < 16 ? 1 : 2;  // of the 16 tokens of a tensor core

// The index in a chunk of the first number of a pair.
template <int DISTANCE>
__device__ __forceinline__ constexpr int low_of(int pair) {
    return pair / DISTANCE * 2 * DISTANCE + pair % DISTANCE;
}

// Read a chunk of a token, in pairs of neighbouring columns.
__device__ __forceinline__ void read_input(u32 (&natural)[16], const u16* at, int left) {
#pragma unroll
    for (int i = 0; i < 16; i++) natural[i] = 0;
#if ALIGNED
    if (left <= 0) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 quad = __ldg((const uint4*)at + i);
        natural[4 * i] = quad.x, natural[4 * i + 1] = quad.y;
        natural[4 * i + 2] = quad.z, natural[4 * i + 3] = quad.w;
    }
#else
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (2 * i < left) natural[i] = __ldg(at + 2 * i);
        if (2 * i + 1 < left) natural[i] |= (u32)__ldg(at + 2 * i + 1) << 16;
    }
#endif
}

template <typename Matrix>
__device__ __forceinline__ void multiply_few_tokens(
    const Matrix& matrix, const u16* x, u16* y, int tokens, int d_out, int d_in) {
    __shared__ float partial[WARPS][TOKENS][TILES * 8];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_row = blockIdx.x * (TILES * 8), first_token = blockIdx.y * TOKENS;
    const int steps = (d_in + 127) / 128;
    int row[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) row[i] = min(first_row + i * 8 + g, d_out - 1);

    typename Matrix::Chunk ahead[STAGES][TILES];
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
        for (int i = 0; i < TILES; i++) matrix.start(ahead[s][i], row[i], warp + s * WARPS);
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
        for (int i = 0; i < TILES; i++) matrix.read(ahead[s][i], row[i], warp + s * WARPS);

    float sums[BLOCKS_OF_TOKENS][TILES][4] = {};
    for (int base = warp; base < steps; base += STAGES * WARPS) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            const int step = base + s * WARPS;
            if (step >= steps) break;
            u32 values[TILES][16];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                matrix.unpack(ahead[s][i], row[i], step, values[i]);
                matrix.read(ahead[s][i], row[i], step + STAGES * WARPS);
            }
            const int column = (step * 4 + t) * 32;
#pragma unroll
            for (int b = 0; b < BLOCKS_OF_TOKENS; b++) {
                u32 inputs[HALVES][16];
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const int token = first_token + b * 16 + h * 8 + g;
                    u32 natural[16];
                    read_input(natural, x + (size_t)token * d_in + column,
                               token < tokens ? d_in - column : 0);
                    repeat<16>([&]<int PAIR>() {
                        constexpr int DISTANCE = Matrix::DISTANCE, low = low_of<DISTANCE>(PAIR);
                        if constexpr (DISTANCE == 1)
                            inputs[h][PAIR] = natural[PAIR];
                        else
                            inputs[h][PAIR] = __byte_perm(
                                natural[low / 2], natural[(low + DISTANCE) / 2],
                                low % 2 ? 0x7632 : 0x5410);
                    });
                }
#pragma unroll
                for (int p = 0; p < 16; p += 2)
#pragma unroll
                    for (int i = 0; i < TILES; i++)
                        multiply(sums[b][i], inputs[0][p], HALVES == 2 ? inputs[HALVES - 1][p] : 0,
                                 inputs[0][p + 1], HALVES == 2 ? inputs[HALVES - 1][p + 1] : 0,
                                 values[i][p], values[i][p + 1]);
            }
        }
    }

    // Add what the warps have found. Thread 4 g + t has token g, and g + 8, of rows 2 t, 2 t + 1.
#pragma unroll
    for (int b = 0; b < BLOCKS_OF_TOKENS; b++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                float* at = &partial[warp][b * 16 + h * 8 + g][i * 8 + 2 * t];
                at[0] = sums[b][i][2 * h];
                at[1] = sums[b][i][2 * h + 1];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * TILES * 8; i += WARPS * 32) {
        const int token = i / (TILES * 8), at = i % (TILES * 8), out = first_row + at;
        if (first_token + token >= tokens || out >= d_out) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[w][token][at];
        y[(size_t)(first_token + token) * d_out + out] = both(sum * matrix.scale(out), 0);
    }
}
