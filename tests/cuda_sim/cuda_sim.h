// CUDA C++ as g++ understands it: stands in front of the text of a kernel. Only what kernels use, and no includes, as in NVRTC.
#pragma once
#include "abi.h"

#define CUDA_SIM 1
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __constant__ static
#define __shared__ static  // a module's .bss: poisoned before each block, so no other variable may live there
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx sim_thread->index
#define blockIdx sim_block
#define blockDim sim_block_size
#define gridDim sim_grid_size
constexpr int warpSize = 32;

// ---- vector types ----

#define SIM_VECTORS(T, name, size)                                                             \
    struct alignas(size) name##1 { T x; };                                                     \
    struct alignas(2 * size) name##2 { T x, y; };                                              \
    struct alignas(4 * size > 16 ? 16 : 4 * size) name##4 { T x, y, z, w; };                   \
    inline name##1 make_##name##1(T x) { return {x}; }                                         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIM_VECTORS(signed char, char, 1)
SIM_VECTORS(unsigned char, uchar, 1)
SIM_VECTORS(short, short, 2)
SIM_VECTORS(unsigned short, ushort, 2)
SIM_VECTORS(int, int, 4)
SIM_VECTORS(unsigned, uint, 4)
SIM_VECTORS(float, float, 4)
SIM_VECTORS(long long, longlong, 8)
SIM_VECTORS(unsigned long long, ulonglong, 8)

// ---- arithmetic ----

#define SIM_MATH1(f) extern "C" float f(float) noexcept;
SIM_MATH1(expf) SIM_MATH1(exp2f) SIM_MATH1(expm1f) SIM_MATH1(logf) SIM_MATH1(log2f) SIM_MATH1(log1pf) SIM_MATH1(sinf)
SIM_MATH1(cosf) SIM_MATH1(tanhf) SIM_MATH1(erff) SIM_MATH1(sqrtf) SIM_MATH1(fabsf) SIM_MATH1(floorf) SIM_MATH1(ceilf)
SIM_MATH1(truncf) SIM_MATH1(rintf) SIM_MATH1(roundf)
extern "C" float powf(float, float) noexcept;
extern "C" float fmodf(float, float) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" int printf(const char*, ...);
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float copysignf(float a, float b) { return __builtin_copysignf(a, b); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f; }

template <class To, class From>
inline To sim_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float x) { return sim_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return sim_bits<unsigned>(x); }
inline float __int_as_float(int x) { return sim_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return sim_bits<float>(x); }
// To an integer: NaN gives 0, what is too large the nearest end.
inline int sim_to_int(float x) {
    return isnan(x) ? 0 : x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : (int)x;
}
inline int __float2int_rn(float x) { return sim_to_int(rintf(x)); }
inline int __float2int_rz(float x) { return sim_to_int(x); }
inline int __float2int_rd(float x) { return sim_to_int(floorf(x)); }
inline float __int2float_rn(int x) { return (float)x; }

#define SIM_MIN_MAX(T)                                \
    inline T min(T a, T b) { return b < a ? b : a; }  \
    inline T max(T a, T b) { return a < b ? b : a; }
SIM_MIN_MAX(int)
SIM_MIN_MAX(unsigned)
SIM_MIN_MAX(long)
SIM_MIN_MAX(unsigned long)
SIM_MIN_MAX(long long)
SIM_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline int abs(int x) { return x < 0 ? -x : x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned byte = bytes >> 8 * (selector >> 4 * i & 7) & 255;
        if (selector >> 4 * i & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
template <class Byte, class Sum>
inline Sum sim_dp4a(unsigned a, unsigned b, Sum sum) {
    unsigned total = (unsigned)sum;  // wraps round
    for (int i = 0; i < 32; i += 8) total += (unsigned)((int)(Byte)(a >> i) * (int)(Byte)(b >> i));
    return (Sum)total;
}
inline int __dp4a(int a, int b, int sum) { return sim_dp4a<signed char>((unsigned)a, (unsigned)b, sum); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) { return sim_dp4a<unsigned char>(a, b, sum); }
template <class F>
inline unsigned sim_bytes(unsigned a, unsigned b, F f) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) result |= (f((signed char)(a >> i), (signed char)(b >> i)) & 255u) << i;
    return result;
}
inline unsigned __vadd4(unsigned a, unsigned b) { return sim_bytes(a, b, [](int x, int y) { return (unsigned)(x + y); }); }
inline unsigned __vsub4(unsigned a, unsigned b) { return sim_bytes(a, b, [](int x, int y) { return (unsigned)(x - y); }); }
inline unsigned __vcmpeq4(unsigned a, unsigned b) { return sim_bytes(a, b, [](int x, int y) { return x == y ? 255u : 0u; }); }
inline unsigned __vcmpne4(unsigned a, unsigned b) { return ~__vcmpeq4(a, b); }

// ---- float16 ----

inline float sim_half_to_float(unsigned short h) {
    float magnitude = sim_bits<float>((h & 0x7FFFu) << 13) * 0x1p112f;  // exact, subnormal numbers too
    unsigned bits = sim_bits<unsigned>(magnitude) | (h & 0x8000u) << 16;
    return sim_bits<float>((h & 0x7C00u) == 0x7C00u ? bits | 0x7F800000u : bits);
}
inline unsigned short sim_float_to_half(float f) {  // to the nearest, ties to even
    unsigned bits = sim_bits<unsigned>(f), sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return (unsigned short)(sign | 0x7FFFu);
    if (bits >= 0x477FF000u) return (unsigned short)(sign | 0x7C00u);  // 65520 and more
    if (bits < 0x38800000u)  // below the normal numbers: let the addition round to multiples of 2^-24
        return (unsigned short)(sign | (sim_bits<unsigned>(sim_bits<float>(bits) + 0.5f) - 0x3F000000u));
    bits += 0xFFFu + (bits >> 13 & 1u);
    return (unsigned short)(sign | (bits - 0x38000000u) >> 13);
}

// ---- memory ----

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T value) { *p = value; }
template <class T> inline void __stcg(T* p, T value) { *p = value; }

template <class T> struct sim_same { typedef T type; };  // no deduction from the second argument: atomicAdd(&x, 1)
template <class T, class F>
inline T sim_atomic(T* p, F f) {  // one thread runs at a time
    T old = *p;
    *p = f(old);
    return old;
}
template <class T> inline T atomicAdd(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T x) { return (T)(x + v); }); }
template <class T> inline T atomicSub(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T x) { return (T)(x - v); }); }
template <class T> inline T atomicMax(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T x) { return x < v ? v : x; }); }
template <class T> inline T atomicMin(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T x) { return v < x ? v : x; }); }
template <class T> inline T atomicOr(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T x) { return x | v; }); }
template <class T> inline T atomicAnd(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T x) { return x & v; }); }
template <class T> inline T atomicExch(T* p, typename sim_same<T>::type v) { return sim_atomic(p, [=](T) { return v; }); }
template <class T>
inline T atomicCAS(T* p, typename sim_same<T>::type wanted, typename sim_same<T>::type v) {
    return sim_atomic(p, [=](T x) { return x == wanted ? v : x; });
}
inline void __threadfence_block() { sim_fence(); }
inline void __threadfence() { sim_fence(); }
inline void __threadfence_system() { sim_fence(); }

// ---- threads together ----

inline void __syncthreads(int line = __builtin_LINE()) { sim_barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { sim_meet(mask, nullptr, nullptr, line); }
inline void __nanosleep(unsigned) { sim_rest(); }
inline long long clock64() { return sim_clock(); }
inline int clock() { return (int)sim_clock(); }
[[noreturn]] inline void __trap(int line = __builtin_LINE()) { sim_fault("__trap", line); }

struct sim_exchange {
    unsigned long long value;
    int source;
};
inline void sim_do_exchange(void* const* mine, unsigned present) {
    unsigned long long values[32];
    for (int lane = 0; lane < 32; lane++)  // a lane that takes no part holds no value that means anything
        values[lane] = present >> lane & 1 ? ((sim_exchange*)mine[lane])->value : 0x7FF77FF77FF77FF7ULL;
    for (unsigned left = present; left; left &= left - 1) {
        sim_exchange* e = (sim_exchange*)mine[__builtin_ctz(left)];
        e->value = values[e->source];
    }
}
template <class T>
inline T sim_shuffle(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    sim_exchange e = {0, source};
    __builtin_memcpy(&e.value, &value, sizeof value);
    sim_meet(mask, sim_do_exchange, &e, line);
    __builtin_memcpy(&value, &e.value, sizeof value);
    return value;
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    return sim_shuffle(mask, value, (sim_thread->lane & -width) + (source & (width - 1)), line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    int lane = sim_thread->lane, source = lane - (int)delta;
    return sim_shuffle(mask, value, source < (lane & -width) ? lane : source, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    int lane = sim_thread->lane, source = lane + (int)delta;
    return sim_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, int line = __builtin_LINE()) {
    int lane = sim_thread->lane, source = lane ^ with;
    return sim_shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}

struct sim_vote {
    unsigned mine, votes, voters;
};
inline void sim_do_vote(void* const* mine, unsigned present) {
    unsigned votes = 0;
    for (unsigned left = present; left; left &= left - 1) {
        int lane = __builtin_ctz(left);
        votes |= ((sim_vote*)mine[lane])->mine << lane;
    }
    for (unsigned left = present; left; left &= left - 1) {
        sim_vote* vote = (sim_vote*)mine[__builtin_ctz(left)];
        vote->votes = votes, vote->voters = present;
    }
}
inline sim_vote sim_take_vote(unsigned mask, int predicate, int line) {
    sim_vote vote = {predicate != 0, 0, 0};
    sim_meet(mask, sim_do_vote, &vote, line);
    return vote;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return sim_take_vote(mask, predicate, line).votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return sim_take_vote(mask, predicate, line).votes != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    sim_vote vote = sim_take_vote(mask, predicate, line);
    return vote.votes == vote.voters;
}
inline unsigned __activemask() { return 1u << sim_thread->lane; }  // the least that CUDA promises

// ---- tensor cores: D = A·B + C by the fragment layouts of the PTX manual (g = lane / 4, t = lane % 4) ----

struct sim_mma {
    void* c;
    const unsigned *a, *b;
    int line;
};
// Element i of a fragment of 4-byte registers that hold elements of type T.
template <class T>
inline T sim_element(const unsigned* registers, int i) {
    T value;
    __builtin_memcpy(&value, (const char*)registers + i * sizeof(T), sizeof value);
    return value;
}
// T: what the registers hold; `per`: how many of them in one register; columns of A: 8 per register.
template <class T, class Sum, class Number>
inline void sim_do_mma(void* const* mine, unsigned present, Number number) {
    constexpr int per = 4 / sizeof(T), K = 8 * per;
    if (present != ~0u) sim_fault("mma needs all lanes of the warp", ((const sim_mma*)mine[__builtin_ctz(present)])->line);
    Sum a[16][K], b[8][K];
    for (int lane = 0; lane < 32; lane++) {
        const sim_mma* m = (const sim_mma*)mine[lane];
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < per; i++)
                a[g + r % 2 * 8][r / 2 * (K / 2) + t * per + i] = number(sim_element<T>(m->a, r * per + i));
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < per; i++) b[g][r * (K / 2) + t * per + i] = number(sim_element<T>(m->b, r * per + i));
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            Sum sum = 0;
            for (int k = 0; k < K; k++) sum += a[row][k] * b[column][k];
            ((Sum*)((const sim_mma*)mine[lane])->c)[i] += sum;
        }
}
inline void sim_do_mma_f16(void* const* mine, unsigned present) {
    sim_do_mma<unsigned short, float>(mine, present, sim_half_to_float);
}
inline void sim_do_mma_s8(void* const* mine, unsigned present) {
    sim_do_mma<signed char, int>(mine, present, [](signed char x) { return (int)x; });
}
inline void sim_mma_f16(float* c, const unsigned* a, const unsigned* b, int line) {
    sim_mma m = {c, a, b, line};
    sim_meet(~0u, sim_do_mma_f16, &m, line);
}
inline void sim_mma_s8(int* c, const unsigned* a, const unsigned* b, int line) {
    sim_mma m = {c, a, b, line};
    sim_meet(~0u, sim_do_mma_s8, &m, line);
}

// ---- calling a kernel that is known by its signature only ----

template <int... I> struct sim_numbers {};
template <class T> struct sim_kind { static constexpr int value = T(-1) < T(0) ? 'i' : 'u'; };
template <class T> struct sim_kind<T*> { static constexpr int value = 'p'; };
template <> struct sim_kind<float> { static constexpr int value = 'f'; };
template <> struct sim_kind<double> { static constexpr int value = 'f'; };

template <auto kernel> struct sim_entry;
template <class... P, void (*kernel)(P...)>
struct sim_entry<kernel> {
    static constexpr int count = sizeof...(P);
    static constexpr sim_parameter parameters[count + 1] = {{sim_kind<P>::value, sizeof(P)}..., {0, 0}};
    template <int... I> static void call(const char* arguments, sim_numbers<I...>) { kernel(*(const P*)(arguments + 8 * I)...); }
    static void invoke(const char* arguments) { call(arguments, sim_numbers<__integer_pack(count)...>()); }
};
constexpr int sim_first(int first, int = 0, int = 0) { return first; }

extern "C" {
__attribute__((visibility("hidden"))) extern char __bss_start[], _end[];
__attribute__((visibility("default"))) char* sim_static_shared[] = {__bss_start, _end};
}
#define SIM_KERNEL(name, ...)                                                  \
    extern "C" __attribute__((visibility("default"))) const sim_kernel sim_kernel_##name = { \
        sim_entry<name>::invoke, sim_entry<name>::parameters, sim_entry<name>::count, sim_first(__VA_ARGS__)};
