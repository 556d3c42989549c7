// out [n, rows] = x [n, cols] · Wᵀ for a W stored as WEIGHT: for few tokens as matvec.cuh says, for many as tile.cuh says.
//
// x is int8 blocks (quants/activations.cuh), or float32 for types without blocks; W begins at a multiple of 16.
// matmul_one is for one token, matmul_few for up to 8, matmul_many for any number.
//
// The text is compiled as it is for `quantize`, after `#define WEIGHT Q4_K` for the rest.

#if !defined(WEIGHT)

// x8 = int8 blocks of x [n, cols], whose rows are x_stride floats apart. 5.25 bytes a value. A warp makes a block; grid
// (n · cols / 32 / 8 rounded up), block (32, 8).
extern "C" __global__ void __launch_bounds__(256) quantize(uint8_t* x8, const float* x, int x_stride, int n, int cols) {
    const int64_t count = (int64_t)n * cols, i = ((int64_t)blockIdx.x * 8 + threadIdx.y) * 32 + threadIdx.x;
    if (i < count) quantize_block(x8, count, i, x[i / cols * x_stride + i % cols]);
}

#else

template <int N>
__device__ __forceinline__ void few(float* out, const uint8_t* w, const void* x, int n, int rows, int cols) {
    extern __shared__ uint4 stages[];
    const int warp = blockIdx.x * blockDim.y + threadIdx.y;
    uint8_t* stage = (uint8_t*)stages + threadIdx.y * WARP_BYTES<WEIGHT>;
    multiply<WEIGHT, N>(w, rows, cols, x, n, 0, n, warp, gridDim.x * blockDim.y, stage,
                        [=](int row, int t, float y) { out[(int64_t)t * rows + row] = y; });
}

extern "C" __global__ void __launch_bounds__(128)
matmul_one(float* out, const uint8_t* w, const void* x, int n, int rows, int cols) {
    few<1>(out, w, x, n, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
matmul_few(float* out, const uint8_t* w, const void* x, int n, int rows, int cols) {
    few<8>(out, w, x, n, rows, cols);
}

extern "C" __global__ void __launch_bounds__(WARP * TILE_WARPS, 2)
matmul_many(float* out, const uint8_t* w, const void* x, int n, int rows, int cols) {
    __shared__ int tokens[TILE_TOKENS];
    const int row = TILE_ROWS * blockIdx.x, token = TILE_TOKENS * blockIdx.y, count = min(TILE_TOKENS, n - token);
    if (thread_number() < count) tokens[thread_number()] = token + thread_number();
    __syncthreads();
    tile<WEIGHT>(w + row * row_bytes<WEIGHT>(cols), rows - row, cols, x, n, tokens, count).each([=](int r, int t, float y) {
        if (row + r < rows && t < count) out[(int64_t)(token + t) * rows + row + r] = y;
    });
}

#endif
