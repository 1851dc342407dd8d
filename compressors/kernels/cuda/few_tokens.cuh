// The product of few rows of inputs, the tokens, and a matrix that is unpacked in registers.
//
// Needs these macros besides BFLOAT:
//   TOKENS  tokens per block, a multiple of 8
//   TILES   tiles of 16 rows of the matrix per block
//   WARPS   warps per block, which share the columns
//   STAGES  chunks that a thread reads ahead
//   MEMBERS matrices that multiply the same input in one launch
//
// A tensor core multiplies 16 rows by 8 tokens, 16 columns at a time, and a sum over columns may be
// taken in any order. So a thread unpacks a *chunk* of 32 columns of a row, and the numbers are used
// in the order in which they come. A *step* is 128 columns: threads 4 g to 4 g + 3 of a warp have
// four chunks of the rows g and g + 8, and of token g. A chunk is one piece of 32 columns, or two
// pieces of 16 columns that are 64 columns apart: then the four threads read neighbouring words at
// once.
//
// The type Matrix, which the kernel's file defines, describes what is stored:
//   DISTANCE  columns between the two numbers of a pair: number 2 DISTANCE i + j of a chunk is with
//             the one DISTANCE further, for j < DISTANCE
//   PIECE     columns of a piece: 32 or 16
//   WHOLE     whether columns are a multiple of 32, and inputs start at multiples of 16 bytes
//   Row, row(index)          where the first chunk of a thread is
//   Chunk                    the registers of a chunk that is read ahead
//   start(chunk, row, step)  called before the first read
//   read(chunk, row, step)   request a chunk; for the steps of a warp, one after the other
//   unpack(chunk, row, step, values)  make 16 pairs of it: any finite numbers where columns end
//   scale(index)             factor of the sums of a row
#pragma once

#include "numbers.cuh"

constexpr int EIGHTS = TOKENS / 8;
constexpr int ROWS = TILES * 16;  // of a matrix per block

// The only parameter of a kernel. All fields have eight bytes, so that a launch can pass an array.
template <typename Stored>
struct Arguments {
    const u16* x;
    long long tokens, d_in;
    struct Member {
        Stored stored;
        u16* y;
        long long d_out;
    } members[MEMBERS];
};

// The matrix of this block, and the number of the block among those of the matrix.
template <typename Stored>
__device__ __forceinline__ const typename Arguments<Stored>::Member& member_of_block(
    const Arguments<Stored>& arguments, int& block) {
    int member = 0;
    block = blockIdx.x;
#pragma unroll
    for (int i = 0; i + 1 < MEMBERS; i++) {
        const int blocks = ((int)arguments.members[i].d_out + ROWS - 1) / ROWS;
        if (member == i && block >= blocks) member++, block -= blocks;
    }
    return arguments.members[member];
}

// A tensor core takes about 20 cycles to add to a sum: several sums are under way.
constexpr int CHAINS = EIGHTS * TILES >= 4 ? 1 : EIGHTS * TILES >= 2 ? 2 : 4;

// The index in a chunk of the first number of a pair.
template <int DISTANCE>
__device__ __forceinline__ constexpr int low_of(int pair) {
    return pair / DISTANCE * 2 * DISTANCE + pair % DISTANCE;
}

// The column of a number of the chunk that this thread has in a step.
template <int PIECE>
__device__ __forceinline__ int column_of(int step, int index) {
    return step * 128 + index / PIECE * (4 * PIECE) + threadIdx.x % 4 * PIECE + index % PIECE;
}

// Read a chunk of a token, in pairs of neighbouring columns; zeros where columns end.
template <typename Matrix>
__device__ __forceinline__ void read_input(
    u32 (&natural)[16], const u16* token, int step, int d_in, bool exists) {
#pragma unroll
    for (int i = 0; i < 16; i++) natural[i] = 0;
    if constexpr (Matrix::WHOLE) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = column_of<Matrix::PIECE>(step, 8 * i);
            if (exists && column < d_in) {
                const uint4 quad = __ldg((const uint4*)(token + column));
                natural[4 * i] = quad.x, natural[4 * i + 1] = quad.y;
                natural[4 * i + 2] = quad.z, natural[4 * i + 3] = quad.w;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int column = column_of<Matrix::PIECE>(step, i);
            if (exists && column < d_in) natural[i / 2] |= (u32)__ldg(token + column) << i % 2 * 16;
        }
    }
}

template <typename Matrix>
__device__ __forceinline__ void multiply_few_tokens(
    const Matrix& matrix, const u16* x, u16* y, int tokens, int d_out, int d_in, int block) {
    __shared__ float partial[WARPS][TOKENS][ROWS + 4];  // 4: fewer conflicts of banks
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_row = block * ROWS, first_token = blockIdx.y * TOKENS;
    const int steps = (d_in + 127) / 128;

    typename Matrix::Row rows[TILES][2];
    typename Matrix::Chunk ahead[STAGES][TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            rows[i][h] = matrix.row(min(first_row + i * 16 + h * 8 + g, d_out - 1));
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) matrix.start(ahead[s][i][h], rows[i][h], warp + s * WARPS);
#pragma unroll
    for (int s = 0; s < STAGES; s++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) matrix.read(ahead[s][i][h], rows[i][h], warp + s * WARPS);

    const u16* inputs = x + (size_t)(first_token + g) * d_in;
    float sums[EIGHTS][TILES][CHAINS][4] = {};
    for (int base = warp; base < steps; base += STAGES * WARPS) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            const int step = base + s * WARPS;
            if (step >= steps) break;
            u32 natural[16];
            read_input<Matrix>(natural, inputs, step, d_in, first_token + g < tokens);
            typename Matrix::Chunk now[TILES][2];
            u32 values[TILES][2][16];
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    now[i][h] = ahead[s][i][h];
                    matrix.read(ahead[s][i][h], rows[i][h], step + STAGES * WARPS);
                }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    matrix.unpack(now[i][h], rows[i][h], step, values[i][h]);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                u32 pairs[16];
                repeat<16>([&]<int PAIR>() {
                    constexpr int DISTANCE = Matrix::DISTANCE, low = low_of<DISTANCE>(PAIR);
                    if constexpr (DISTANCE == 1)
                        pairs[PAIR] = natural[PAIR];
                    else
                        pairs[PAIR] = __byte_perm(natural[low / 2], natural[(low + DISTANCE) / 2],
                                                  low % 2 ? 0x7632 : 0x5410);
                });
                if (e + 1 < EIGHTS)
                    read_input<Matrix>(natural, inputs + (size_t)(e + 1) * 8 * d_in, step, d_in,
                                       first_token + (e + 1) * 8 + g < tokens);
#pragma unroll
                for (int p = 0; p < 16; p += 2)
#pragma unroll
                    for (int i = 0; i < TILES; i++)
                        multiply(sums[e][i][p / 2 % CHAINS], values[i][0][p], values[i][1][p],
                                 values[i][0][p + 1], values[i][1][p + 1], pairs[p], pairs[p + 1]);
            }
        }
    }

    // Add what the warps have found. A thread has tokens 2 t and 2 t + 1 of the rows g and g + 8.
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float sum = 0;
#pragma unroll
                for (int c = 0; c < CHAINS; c++) sum += sums[e][i][c][j];
                partial[warp][e * 8 + 2 * t + j % 2][i * 16 + j / 2 * 8 + g] = sum;
            }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * ROWS; i += WARPS * 32) {
        const int token = i / ROWS, at = i % ROWS, row = first_row + at;
        if (first_token + token >= tokens || row >= d_out) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[w][token][at];
        y[(size_t)(first_token + token) * d_out + row] = both(sum * matrix.scale(row), 0);
    }
}
