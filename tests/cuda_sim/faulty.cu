// Kernels that each do one thing wrong; tests/test_cuda_sim_faults.py knows what is said about them, and the lines.

extern "C" __global__ void read(float* out, const float* in, int64_t at) { *out = in[at]; }
extern "C" __global__ void write(float* out, int64_t at) { out[at] = 1; }
extern "C" __global__ void write_byte(uint8_t* out, int64_t at) { out[at] = 1; }
extern "C" __global__ void misaligned(int* out, const uint8_t* in) { *out = *(const int*)(in + 2); }
extern "C" __global__ void outside_array(float* out, int i) {
    __shared__ float tile[8];
    tile[i] = 1;
    *out = tile[0];
}
extern "C" __global__ void outside_dynamic(float* out, int i) {
    extern __shared__ float tile[];
    tile[i] = 1;
    *out = tile[0];
}
extern "C" __global__ void divide(int* out, int a, int b) { *out = a / b; }
extern "C" __global__ void trap() { if (threadIdx.x == 3) __trap(); }
extern "C" __global__ void deep(int* out, int n) {
    volatile int local[20000];
    for (int i = 0; i < n; i++) local[i] = i;
    *out = local[n / 2];
}
extern "C" __global__ void lonely_lane(int* out) {
    if (threadIdx.x == 7) __syncthreads();
    else out[threadIdx.x] = __shfl_sync(ALL_LANES, 1, 0);
}
extern "C" __global__ void two_barriers() {
    if (threadIdx.x < 10)
        __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void two_operations(int* out) {
    if (threadIdx.x < 10) out[threadIdx.x] = __shfl_sync(ALL_LANES, 1, 0);
    else out[threadIdx.x] = __shfl_sync(ALL_LANES, 1, 0);
}
extern "C" __global__ void two_masks(int* out) { out[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? ALL_LANES : 0xFFFF8000, 1, 0); }
extern "C" __global__ void not_in_mask(int* out) { out[threadIdx.x] = __shfl_sync(1, 1, 0); }
extern "C" __global__ void endless(volatile int* out) { while (out[0] != 5) ; }
extern "C" __global__ void never(const int* flag) { wait_flag(flag, 1); }
extern "C" __global__ void __launch_bounds__(64) bounded(int* out) { *out = 1; }
__device__ int* tile_of(int i) {
    __shared__ int tile[32];
    return tile + i;
}
template <int N>
__device__ int* tile_of_template(int i) {
    __shared__ int tile[N];
    return tile + i;
}
extern "C" __global__ void unwritten(int* out) {
    extern __shared__ int dynamic[];
    int i = threadIdx.x, *tiles[] = {tile_of(i), tile_of_template<32>(i), dynamic + i};
    for (int k = 0; k < 3; k++) {
        out[32 * k + i] = *tiles[k];
        *tiles[k] = k;
    }
}
