// What all CUDA kernels share: types, loads, sums over a warp and a block, tensor-core products, flags that the host sees.
//
// It stands in front of every kernel's text. Nothing is included, not even CUDA's own headers: then NVRTC needs none of them
// and the text is all there is to compile. Half-precision numbers are uint16_t in memory, pairs of them uint32_t.
// tests/cuda_sim compiles the same text with g++ and defines CUDA_SIM; what is PTX here has a plain body there.

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xFFFFFFFF;

// Numbers of the thread in its block, and of its lane and warp; blocks are (x) or (x, y) threads.
__device__ __forceinline__ int thread_number() { return threadIdx.x + blockDim.x * threadIdx.y; }
__device__ __forceinline__ int lane_number() { return thread_number() % WARP; }
__device__ __forceinline__ int warp_number() { return thread_number() / WARP; }

template <class T>
__device__ __forceinline__ constexpr T divide_up(T a, T b) {
    return (a + b - 1) / b;
}

// ---- loads ----

// 16 bytes from an address that is a multiple of 16.
__device__ __forceinline__ uint4 load_16(const void* p) { return *(const uint4*)p; }

// The same of bytes that nobody reads again, weights above all: they leave the first-level cache to the others.
__device__ __forceinline__ uint4 load_16_once(const void* p) {
#if defined(CUDA_SIM) || __CUDA_ARCH__ < 700
    return load_16(p);
#else
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#endif
}

// 4 bytes from an address that is only a multiple of 2, or of nothing: many block types are not multiples of 4 bytes.
__device__ __forceinline__ int load_int_2(const void* p) {
    const uint16_t* words = (const uint16_t*)p;
    return (int)(words[0] | (uint32_t)words[1] << 16);
}

__device__ __forceinline__ int load_int_1(const void* p) {
    const uint8_t* bytes = (const uint8_t*)p;
    return (int)(bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24);
}

// ---- half precision ----

__device__ __forceinline__ float half_to_float(uint16_t h) {
#ifdef CUDA_SIM
    return sim_half_to_float(h);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float f) {  // to the nearest, ties to even
#ifdef CUDA_SIM
    return sim_float_to_half(f);
#else
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#endif
}

// A pair's first number is in its low half, as in memory.
__device__ __forceinline__ float2 half2_to_float2(uint32_t pair) {
    return make_float2(half_to_float((uint16_t)pair), half_to_float((uint16_t)(pair >> 16)));
}

__device__ __forceinline__ uint32_t floats_to_half2(float first, float second) {
#if defined(CUDA_SIM) || __CUDA_ARCH__ < 800
    return float_to_half(first) | (uint32_t)float_to_half(second) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#endif
}

__device__ __forceinline__ float bfloat16_to_float(uint16_t b) { return __uint_as_float((uint32_t)b << 16); }

// ---- sums over a warp and a block ----

struct Sum {
    static __device__ float nothing() { return 0; }
    static __device__ float of(float a, float b) { return a + b; }
};

struct Max {
    static __device__ float nothing() { return __int_as_float(0xFF800000); }
    static __device__ float of(float a, float b) { return fmaxf(a, b); }
};

// Over groups of `width` neighbouring lanes; every lane of the warp gets its group's. All lanes must be there.
template <class Op, int width = WARP>
__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
    for (int offset = width / 2; offset > 0; offset /= 2) x = Op::of(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Over the block, which must be whole warps; every thread gets it.
template <class Op>
__device__ __forceinline__ float over_block(float x) {
    __shared__ float of_warp[WARP];
    int lane = lane_number(), n_warps = blockDim.x * blockDim.y / WARP;
    x = over_warp<Op>(x);
    __syncthreads();  // what the call before this one left there has been read
    if (lane == 0) of_warp[warp_number()] = x;
    __syncthreads();
    return over_warp<Op>(lane < n_warps ? of_warp[lane] : Op::nothing());
}

__device__ __forceinline__ float warp_sum(float x) { return over_warp<Sum>(x); }
__device__ __forceinline__ float warp_max(float x) { return over_warp<Max>(x); }
__device__ __forceinline__ float block_sum(float x) { return over_block<Sum>(x); }
__device__ __forceinline__ float block_max(float x) { return over_block<Max>(x); }

// ---- copies from device to shared memory that don't pass through registers (sm_80; elsewhere plain) ----

// 16 bytes, both addresses multiples of 16. Seen by this thread after copy_async_wait, by others after a barrier behind that.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
#if __CUDA_ARCH__ < 800
    *(uint4*)shared = *(const uint4*)global;
#elif defined(CUDA_SIM)
    sim_copy_late((uint4*)shared, (const uint4*)global, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
#endif
}

// The copies since the last commit are a group.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ < 800
#elif defined(CUDA_SIM)
    sim_copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most the last n groups are under way.
template <int n>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ < 800
#elif defined(CUDA_SIM)
    sim_copy_wait(n);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// ---- tensor cores ----
//
// A warp multiplies A [16, K] by B [K, 8] and adds to C [16, 8]. With g = lane / 4 and t = lane % 4, and a register holding e
// neighbours along K (2 of float16, K = 16; 4 of int8, K = 32):
//   a[0..3]  A[g][e·t], A[g + 8][e·t], A[g][K/2 + e·t], A[g + 8][K/2 + e·t]
//   b[0..1]  B[e·t][g], B[K/2 + e·t][g]
//   c[0..3]  C[g][2t], C[g][2t + 1], C[g + 8][2t], C[g + 8][2t + 1]
// sm_75 has smaller ones, of which these are made; older devices compute them with shuffles, correctly and slowly.

// c += A·B, float16 in, float32 sums.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ < 750
    int g = lane_number() / 4, t = lane_number() % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {  // K in pairs: pair i is in register i / 4 of lanes with t = i % 4
        float2 low = half2_to_float2(__shfl_sync(ALL_LANES, a[i / 4 * 2], 4 * g + i % 4));
        float2 high = half2_to_float2(__shfl_sync(ALL_LANES, a[i / 4 * 2 + 1], 4 * g + i % 4));
#pragma unroll
        for (int column = 0; column < 2; column++) {
            float2 right = half2_to_float2(__shfl_sync(ALL_LANES, b[i / 4], 4 * (2 * t + column) + i % 4));
            c[column] = fmaf(low.y, right.y, fmaf(low.x, right.x, c[column]));
            c[column + 2] = fmaf(high.y, right.y, fmaf(high.x, right.x, c[column + 2]));
        }
    }
#elif defined(CUDA_SIM)
    sim_mma_f16(c, a, b, __LINE__);
#elif __CUDA_ARCH__ < 800
#pragma unroll
    for (int i = 0; i < 2; i++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// c += A·B, int8 in, int32 sums.
__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ < 750
    int g = lane_number() / 4, t = lane_number() % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {  // K in fours
        int low = __shfl_sync(ALL_LANES, (int)a[i / 4 * 2], 4 * g + i % 4);
        int high = __shfl_sync(ALL_LANES, (int)a[i / 4 * 2 + 1], 4 * g + i % 4);
#pragma unroll
        for (int column = 0; column < 2; column++) {
            int right = __shfl_sync(ALL_LANES, (int)b[i / 4], 4 * (2 * t + column) + i % 4);
            c[column] = __dp4a(low, right, c[column]);
            c[column + 2] = __dp4a(high, right, c[column + 2]);
        }
    }
#elif defined(CUDA_SIM)
    sim_mma_s8(c, a, b, __LINE__);
#elif __CUDA_ARCH__ < 800
#pragma unroll
    for (int i = 0; i < 4; i++)  // rows 0 to 7 and 8 to 15 with either half of K
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[i % 2 * 2]), "+r"(c[i % 2 * 2 + 1])
            : "r"(a[i]), "r"(b[i / 2]));
#else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8×8 matrices of 16-bit elements from shared memory: lane l names row l % 8 (16 bytes, aligned to 16) of matrix l / 8, and
// gets elements [g][2t], [g][2t + 1] of matrix i in r[i]; with `transposed`, [2t][g] and [2t + 1][g].
template <bool transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
#if defined(CUDA_SIM) || __CUDA_ARCH__ < 750
    int g = lane_number() / 4, t = lane_number() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (transposed) {
            const uint16_t* first = (const uint16_t*)__shfl_sync(ALL_LANES, (uint64_t)row, 8 * i + 2 * t);
            const uint16_t* second = (const uint16_t*)__shfl_sync(ALL_LANES, (uint64_t)row, 8 * i + 2 * t + 1);
            r[i] = first[g] | (uint32_t)second[g] << 16;
        } else {
            r[i] = ((const uint32_t*)__shfl_sync(ALL_LANES, (uint64_t)row, 8 * i + g))[t];
        }
    }
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
#endif
}

// ---- flags in mapped memory: how the host and a running kernel tell each other things (ops/device.py, HostMemory) ----

// A moment's rest in a loop that polls.
__device__ __forceinline__ void rest() {
#if defined(CUDA_SIM) || __CUDA_ARCH__ >= 700
    __nanosleep(100);
#endif
}

// One thread: *flag = count, after all that it has written or has seen the others write before a barrier.
__device__ __forceinline__ void post_flag(int* flag, int count) {
    __threadfence_system();
    *(volatile int*)flag = count;
}

// One thread, then a barrier: go on when *flag has reached count, and see all that was written before.
__device__ __forceinline__ void wait_flag(const int* flag, int count) {
    while (*(const volatile int*)flag < count) rest();
    __threadfence_system();
}
