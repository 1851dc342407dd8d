// Pairs of 16-bit numbers in registers, and tensor cores, for compute capability 8.0 and higher.
//
// BFLOAT selects bfloat16 (1) or float16 (0). No header is included: NVRTC comes without any.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__device__ __forceinline__ constexpr u32 doubled(u32 half) { return half | half << 16; }

__device__ __forceinline__ float number(u32 half) {
#if BFLOAT
    return __uint_as_float(half << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)half));
    return value;
#endif
}

// Round two numbers.
__device__ __forceinline__ u32 both(float low, float high) {
    u32 pair;
#if BFLOAT
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 pair;
#if !BFLOAT
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 900
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
#else  // a - 1 b
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(b), "r"(0xBF80BF80u), "r"(a));
#endif
    return pair;
}

__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 pair;
#if !BFLOAT
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
#else  // a b - 0
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
    return pair;
}

// Add the product of 16 tokens by 16 columns and 16 columns by 8 rows of the matrix.
__device__ __forceinline__ void multiply(
    float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BFLOAT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Read COUNT words if they exist, else leave what is there. They start at a multiple of 16 bytes if
// COUNT is a multiple of 4, of 8 bytes if it is even. Words that four threads read side by side, 16
// bytes each, are used once, and should not displace inputs from the first-level cache.
template <int COUNT>
__device__ __forceinline__ void read_words(u32* words, const u32* at, bool exist) {
    const int p = exist;
    if constexpr (COUNT == 4) {
        asm volatile(
            "{.reg .pred p; setp.ne.s32 p, %5, 0;"
            "@p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
            : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
            : "l"(at), "r"(p));
    } else if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            asm volatile(
                "{.reg .pred p; setp.ne.s32 p, %5, 0;"
                "@p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
                : "+r"(words[i]), "+r"(words[i + 1]), "+r"(words[i + 2]), "+r"(words[i + 3])
                : "l"(at + i), "r"(p));
    } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2)
            asm volatile(
                "{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.nc.v2.u32 {%0,%1}, [%2];}"
                : "+r"(words[i]), "+r"(words[i + 1])
                : "l"(at + i), "r"(p));
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
                         : "+r"(words[i])
                         : "l"(at + i), "r"(p));
    }
}

// Read a half word if it exists.
__device__ __forceinline__ void read_half(u16& half, const u16* at, bool exists) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}"
                 : "+h"(half)
                 : "l"(at), "r"((int)exists));
}

// Call use.operator()<0>(), ..., <COUNT - 1>().
template <int COUNT, int FIRST = 0, typename Use>
__device__ __forceinline__ void repeat(Use use) {
    if constexpr (FIRST < COUNT) {
        use.template operator()<FIRST>();
        repeat<COUNT, FIRST + 1>(use);
    }
}
