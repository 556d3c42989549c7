// A kernel for every feature that kernels use; tests/test_cuda_sim.py knows what each must compute.

extern "C" __global__ void indices(int* out) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

template <class T>
__device__ void turn(T* out, const T* in, T* tile) {
    int i = threadIdx.x, n = blockDim.x;
    tile[i] = in[blockIdx.x * n + i];
    __syncthreads();
    out[blockIdx.x * n + i] = tile[n - 1 - i];
}
#define TURN(name, T)                                                \
    extern "C" __global__ void turn_##name(T* out, const T* in) {    \
        __shared__ T tile[256];                                      \
        turn(out, in, tile);                                         \
    }
TURN(floats, float)
TURN(bytes, uint8_t)

extern "C" __global__ void turn_dynamic(float* out, const float* in) {
    extern __shared__ __align__(16) float tile[];
    turn(out, in, tile);
}

extern "C" __global__ void shuffles(int* out) {
    int lane = lane_number(), v = lane * lane;
    out[lane] = __shfl_sync(ALL_LANES, v, (lane * 5 + 3) % 32);
    out[32 + lane] = __shfl_up_sync(ALL_LANES, v, 3);
    out[64 + lane] = __shfl_down_sync(ALL_LANES, v, 5, 16);
    out[96 + lane] = __shfl_xor_sync(ALL_LANES, v, 9);
    out[128 + lane] = (int)(__shfl_sync(ALL_LANES, (uint64_t)v << 32, 7) >> 32);
    out[160 + lane] = __shfl_sync(ALL_LANES, v, 2, 8);
}

extern "C" __global__ void votes(uint32_t* out) {
    int lane = lane_number();
    out[lane] = __ballot_sync(ALL_LANES, lane % 3 == 0);
    out[32 + lane] = __any_sync(ALL_LANES, lane == 40) + 2 * __any_sync(ALL_LANES, lane == 4);
    out[64 + lane] = __all_sync(ALL_LANES, lane < 31) + 2 * __all_sync(ALL_LANES, lane < 32);
    if (lane < 8) {  // the halves of a warp go their own ways, a different number of times
        uint32_t sum = 0;
        for (int i = 0; i <= 4; i++) sum += __popc(__ballot_sync(0xFF, lane >= i));
        out[96 + lane] = sum;
    } else {
        out[96 + lane] = __shfl_sync(0xFFFFFF00, lane, 20);
    }
    __syncwarp();
    out[128 + lane] = __shfl_xor_sync(ALL_LANES, lane, 16);
}

extern "C" __global__ void early_exit(int* out, int n) {
    __shared__ int first;
    if ((int)threadIdx.x >= n) return;
    if (threadIdx.x == 0) first = n;
    __syncthreads();
    out[threadIdx.x] = first;
}

extern "C" __global__ void atomics(int* counts, float* sum, uint64_t* tickets) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&counts[0], 1);
    atomicMax(&counts[1], i);
    atomicMin(&counts[2], i);
    atomicAdd(sum, 0.5f);
    atomicAdd(tickets, (uint64_t)1 << 33);
    if (atomicCAS(&counts[3], 0, i + 1) == 0) atomicExch(&counts[4], i + 1);
}

extern "C" __global__ void integers(int* out, const int* a, const int* b) {
    int i = threadIdx.x;
    out[i] = __dp4a(a[i], b[i], 100);
    out[256 + i] = (int)__dp4a((uint32_t)a[i], (uint32_t)b[i], 100u);
    out[512 + i] = (int)__byte_perm(a[i], b[i], 0x5140);
    out[768 + i] = min(a[i], b[i]) ^ max(a[i], b[i]) ^ __popc(a[i]) ^ __clz(b[i]);
    out[1024 + i] = (int)__vsub4(a[i], b[i]);
}

extern "C" __global__ void from_half(float* out, const uint16_t* in) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = half_to_float(in[i]);
}

extern "C" __global__ void to_half(uint16_t* out, uint32_t* pairs, const float* in) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = float_to_half(in[i]);
    pairs[i] = floats_to_half2(in[i], -1.5f);
}

__constant__ float SCALE[2] = {2, 4};

extern "C" __global__ void functions(float* out, const float* in) {
    int i = threadIdx.x;
    float x = in[i];
    float results[] = {expf(x), __expf(x), logf(fabsf(x)), tanhf(x), rsqrtf(fabsf(x)), fmaf(x, x, 1.0f), SCALE[i % 2] * x,
                       bfloat16_to_float((uint16_t)(__float_as_uint(x) >> 16)), (float)__float2int_rn(x)};
    for (int k = 0; k < 9; k++) out[k * blockDim.x + i] = results[k];
}

extern "C" __global__ void reductions(float* out, const float* in) {
    float x = in[thread_number()];
    float results[] = {warp_sum(x), warp_max(x), over_warp<Sum, 8>(x), block_sum(x), block_max(-x)};
    for (int k = 0; k < 5; k++) out[k * blockDim.x * blockDim.y + thread_number()] = results[k];
}

extern "C" __global__ void loads(uint32_t* out, const uint8_t* in) {
    int i = threadIdx.x;
    uint4 v = load_16(in + 16 * i), w = load_16_once(in + 16 * i);
    out[i] = v.x ^ v.y ^ v.z ^ v.w;
    out[32 + i] = w.x + w.y + w.z + w.w;
    out[64 + i] = load_int_2(in + 18 * i + 2);
    out[96 + i] = load_int_1(in + 17 * i + 1);
}

// c [16, 8] = a [16, K] · b [8, K]ᵀ, K = 16 of float16 or 32 of int8: one warp. `matrices`: through ldmatrix.
template <class Sum, class F>
__device__ void product(Sum* c, const uint32_t* a, const uint32_t* b, int matrices, F mma) {
    __shared__ __align__(16) uint32_t shared_a[16 * 8], shared_b[8 * 8];
    int lane = lane_number(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) shared_a[i * 32 + lane] = a[i * 32 + lane];
    for (int i = 0; i < 2; i++) shared_b[i * 32 + lane] = b[i * 32 + lane];
    __syncwarp();
    Sum sums[4] = {1, 2, 3, 4};
    uint32_t left[4] = {shared_a[g * 8 + t], shared_a[(g + 8) * 8 + t], shared_a[g * 8 + 4 + t], shared_a[(g + 8) * 8 + 4 + t]};
    uint32_t right[2] = {shared_b[g * 8 + t], shared_b[g * 8 + 4 + t]};
    if (matrices) ldmatrix(left, &shared_a[lane % 16 * 8 + lane / 16 * 4]);
    mma(sums, left, right);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
extern "C" __global__ void product_f16(float* c, const uint32_t* a, const uint32_t* b, int matrices) {
    product(c, a, b, matrices, [](float(&c)[4], uint32_t(&a)[4], uint32_t(&b)[2]) { mma_f16(c, a, b); });
}
extern "C" __global__ void product_s8(int* c, const uint32_t* a, const uint32_t* b, int matrices) {
    product(c, a, b, matrices, [](int(&c)[4], uint32_t(&a)[4], uint32_t(&b)[2]) { mma_s8(c, a, b); });
}
extern "C" __global__ void transposed(uint32_t* out, const uint32_t* in) {
    __shared__ __align__(16) uint32_t rows[32 * 4];
    int lane = lane_number();
    for (int i = 0; i < 4; i++) rows[i * 32 + lane] = in[i * 32 + lane];
    __syncwarp();
    uint32_t r[4];
    ldmatrix<true>(r, rows + lane * 4);
    for (int i = 0; i < 4; i++) out[i * 32 + lane] = r[i];
}

extern "C" __global__ void pipeline(uint4* out, const uint4* in, int n) {
    __shared__ uint4 stage[2][64];
    int i = threadIdx.x;
    copy_async_16(&stage[0][i], &in[i]);
    copy_async_commit();
    for (int k = 0; k < n; k++) {
        if (k + 1 < n) copy_async_16(&stage[(k + 1) % 2][i], &in[(k + 1) * 64 + i]);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        out[k * 64 + i] = stage[k % 2][63 - i];
        __syncthreads();
    }
}

extern "C" __global__ void add(float* out, const float* x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + a;
}

extern "C" __global__ void ping(int* box, int* answer, int count) {
    box[1] = count * count;
    post_flag(box, count);
    wait_flag(answer, count);
    box[2] = answer[1];
}
