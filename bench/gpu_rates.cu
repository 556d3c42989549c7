// What bench.gpu_rates measures a GPU with: warp-wide products from registers, and a kernel that does nothing.
//
// A warp multiplies the same fragments into SUMS independent sums, `rounds` times: nothing is loaded, so the rate is that of the
// instruction. 16 · 8 · K multiply-adds each, K = 16 (float16) or 32 (int8). Fragments are read from memory: no compiler knows them.

constexpr int SUMS = 8;

extern "C" __global__ void nothing() {}

extern "C" __global__ void __launch_bounds__(256) product_f16(float* out, const uint32_t* in, int rounds) {
    const uint32_t *mine = in + 6 * lane_number(), a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
    float sums[SUMS][4] = {}, total = 0;
    for (int round = 0; round < rounds; round++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) mma_f16(sums[i], a, b);
#pragma unroll
    for (int i = 0; i < SUMS; i++) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(256) product_s8(int* out, const uint32_t* in, int rounds) {
    const uint32_t *mine = in + 6 * lane_number(), a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
    int sums[SUMS][4] = {}, total = 0;
    for (int round = 0; round < rounds; round++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) mma_s8(sums[i], a, b);
#pragma unroll
    for (int i = 0; i < SUMS; i++) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
