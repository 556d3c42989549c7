// How activations are stored for integer products, as quants/activations.py rounds them: blocks of 32 columns, in planes.
//
// A buffer of `count` = rows * columns values (columns a multiple of 32) is int8 q[count], float scale[count / 32], float
// sum[count / 32], all row by row; a column's value is scale * q, and sum = scale * (the sum of the q). 1.25 * count bytes.

struct Activations {
    const int8_t* q;
    const float *scale, *sum;

    __device__ Activations(const void* x8, int64_t count)
        : q((const int8_t*)x8), scale((const float*)(q + count)), sum(scale + count / 32) {}
};

// The 32 lanes of a warp write one block: each brings its element `i`, lane 0 one with i % 32 == 0.
__device__ inline void quantize_block(uint8_t* x8, int64_t count, int64_t i, float value) {
    int magnitude = __float_as_int(fabsf(value)), q_sum;
    for (int lanes = 16; lanes; lanes /= 2)  // without their sign, floats order as their bits do, NaN last
        magnitude = max(magnitude, __shfl_xor_sync(ALL_LANES, magnitude, lanes));
    float scale = __int_as_float(magnitude) / 127.0f;
    // Below the normal numbers a scale has too few bits to divide by; NaN and infinity make the whole block NaN.
    scale = !(scale <= 3.402823466e38f) ? __int_as_float(0x7FC00000) : scale >= 1.175494351e-38f ? scale : 0.0f;
    int q = scale > 0 ? __float2int_rn(value * (1.0f / scale)) : 0;
    q_sum = q;
    for (int lanes = 16; lanes; lanes /= 2) q_sum += __shfl_xor_sync(ALL_LANES, q_sum, lanes);
    float* scales = (float*)(x8 + count);
    x8[i] = (uint8_t)q;
    if (i % 32 == 0) {
        scales[i / 32] = scale;
        scales[count / 32 + i / 32] = scale * (float)q_sum;
    }
}
