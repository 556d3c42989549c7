// Many tokens: a block multiplies 128 rows of W with 64 tokens, on tensor cores where W is stored in blocks.
//
// Operations: 2 · rows · tokens · cols. Bytes, from the second-level cache: W for every 64 tokens, x (1.25 a value) for every 128
// rows. Bound: arithmetic. Every 32 columns have scales of their own, so beside each mma (4096 products of int8) a thread has 12
// to 16 float operations, and these are the limit: 22 to 28 instructions an mma, where the tensor cores need 4 clocks or less.
//
// A warp takes 16 rows and all 64 tokens. W and x come into shared memory as they lie in memory; a lane expands its words of W as
// the mma wants them (of 32 columns words t and t + 4, of rows g and g + 8), so nothing is expanded twice, or stored expanded.
// While a block waits for its copies, another one on the same multiprocessor computes.

constexpr int TILE_ROWS = 128, TILE_TOKENS = 64, TILE_WARPS = 8;

// A warp's sums. With g = lane / 4, t = lane % 4: at[n][i] is row g + 8·(i / 2) of the warp's 16, token 8n + 2t + i % 2.
struct TileSums {
    float at[TILE_TOKENS / 8][4] = {};

    // visit(row of the tile, token of the tile, sum)
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        const int g = lane_number() / 4, t = lane_number() % 4;
#pragma unroll
        for (int n = 0; n < TILE_TOKENS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) visit(16 * warp_number() + g + i / 2 * 8, 8 * n + 2 * t + i % 2, at[n][i]);
    }
};

// ---- types of blocks ----

// c = A·B of int8, as float.
__device__ __forceinline__ void product(float (&c)[4], int a0, int a1, int a2, int a3, const uint32_t (&b)[2]) {
    const uint32_t a[4] = {(uint32_t)a0, (uint32_t)a1, (uint32_t)a2, (uint32_t)a3};
    int sums[4] = {};
    mma_s8(sums, a, b);
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = (float)sums[i];
}

template <class Q>
struct BlockTile {
    static constexpr int COLUMNS = Q::block == 256 ? 256 : 128, RUNS = COLUMNS / 32, GROUPS = 32 / Q::group;
    static constexpr int NBYTES = COLUMNS / Q::block * Q::nbytes, PITCH = (NBYTES + 16 - ALIGNMENT<Q> + 15) / 16 * 16;
    static constexpr int X_PITCH = COLUMNS + 16;  // 8 rows of 16 bytes then lie in all 32 banks

    __align__(16) uint8_t weights[TILE_ROWS][PITCH];   // each row as far from a multiple of 16 as in memory
    __align__(16) int8_t inputs[TILE_TOKENS][X_PITCH];
    __align__(16) float factors[RUNS][TILE_TOKENS / 2][Q::minima ? 4 : 2];  // scales of two tokens, then their sums

    // Where the next columns of what a thread copies lie: of its rows g and g + 8 of W every 4th 16 bytes, as of one token's x.
    struct Sources {
        const uint8_t* w[2];
        const int8_t* q;
        const float *scale, *sum;

        __device__ __forceinline__ Sources(const uint8_t* w_first, int n_rows, int cols, const Activations& x, int64_t token) {
            const int row = 16 * warp_number() + lane_number() / 4;
#pragma unroll
            for (int h = 0; h < 2; h++) w[h] = w_first + min(row + 8 * h, n_rows - 1) * row_bytes<Q>(cols);
            q = x.q + token * cols, scale = x.scale + token * (cols / 32), sum = x.sum + token * (cols / 32);
        }
        __device__ __forceinline__ void advance() {
#pragma unroll
            for (int h = 0; h < 2; h++) w[h] += NBYTES;
            q += COLUMNS, scale += RUNS, sum += RUNS;
        }
    };

    __device__ __forceinline__ void fetch(const Sources& from, int runs, int count) {
        const int t = lane_number() % 4, row = 16 * warp_number() + lane_number() / 4, token = thread_number() / 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int before = Q::nbytes % 16 ? skew(from.w[h]) : 0, end = before + runs * 32 / Q::block * Q::nbytes;
#pragma unroll
            for (int i = 0; i < PITCH / 16; i += 4)
                if (16 * (i + t) < end) copy_async_16(&weights[row + 8 * h][16 * (i + t)], from.w[h] - before + 16 * (i + t));
        }
        if (token < count) {
#pragma unroll
            for (int i = 0; i < 2 * RUNS; i += 4)
                if (i + t < 2 * runs) copy_async_16(&inputs[token][16 * (i + t)], from.q + 16 * (i + t));
#pragma unroll
            for (int i = 0; i < RUNS; i += 4) {
                if (i + t >= runs) continue;
                float* to = factors[i + t][token / 2] + token % 2;
                to[0] = from.scale[i + t];
                if constexpr (Q::minima) to[2] = from.sum[i + t];
            }
        }
        copy_async_commit();
    }

    // Scales and minima of one run for a lane's rows g and g + 8.
    struct Scales {
        float scale[2][GROUPS], minimum[2][GROUPS];
    };

    // sums += the run `run` of the tile: `low` and `high` are its words of the lane's two rows, `s` their scales.
    __device__ __forceinline__ void multiply(TileSums& sums, int2 low, int2 high, const Scales& s, int run, int count) const {
        const int lane = lane_number();
#pragma unroll
        for (int n = 0; n < TILE_TOKENS / 8; n += 2) {
            if (8 * n >= count) break;
            uint32_t b[4];  // of tokens 8n … + 7: columns 0 … 15, 16 … 31; of the next 8 tokens
            ldmatrix(b, &inputs[8 * n + lane / 16 * 8 + lane % 8][32 * run + lane / 8 % 2 * 16]);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const uint32_t column[2] = {b[2 * m], b[2 * m + 1]};
                const float* f = factors[run][4 * (n + m) + lane % 4];
                float(&to)[4] = sums.at[n + m];
                if constexpr (Q::group == 32) {
                    float c[4];
                    product(c, low.x, high.x, low.y, high.y, column);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        to[i] = fmaf(c[i] * s.scale[i / 2][0], f[i % 2], to[i]);
                        if constexpr (Q::minima) to[i] = fmaf(-s.minimum[i / 2][0], f[2 + i % 2], to[i]);
                    }
                } else {  // an mma for each half of the columns, the other half zeros
                    float c[2][4], x[2][4];
                    product(c[0], low.x, high.x, 0, 0, column);
                    product(c[1], 0, 0, low.y, high.y, column);
                    if constexpr (Q::minima) {  // sums of 16 activations: rows of ones
                        product(x[0], 0x01010101, 0x01010101, 0, 0, column);
                        product(x[1], 0, 0, 0x01010101, 0x01010101, column);
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float y = fmaf(c[0][i], s.scale[i / 2][0], c[1][i] * s.scale[i / 2][1]);
                        if constexpr (Q::minima) y = fmaf(-s.minimum[i / 2][0], x[0][i], fmaf(-s.minimum[i / 2][1], x[1][i], y));
                        to[i] = fmaf(y, f[i % 2], to[i]);
                    }
                }
            }
        }
    }

    // sums += the runs that are here.
    __device__ __forceinline__ void multiply_all(TileSums& sums, const Sources& from, int runs, int count) const {
        const int lane = lane_number(), t = lane % 4, row = 16 * warp_number() + lane / 4;
        const uint8_t* at[2] = {weights[row], weights[row + 8]};
        if constexpr (Q::nbytes % 16) at[0] += skew(from.w[0]), at[1] += skew(from.w[1]);
        auto block = [&](int h, int run) { return Block<Q, WORDS>{at[h] + run * 32 / Q::block * Q::nbytes}; };
        Scales made;
#pragma unroll 1
        for (int run = 0; run < runs; run++) {
            const unsigned j = run % (Q::block / 32);
            if (run % 4 == 0) {  // lanes that share rows make the scales of four runs, one each
                const unsigned mine = min(run + t, runs - 1);
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
                        made.scale[h][g] = Q::scale(block(h, mine), mine % (Q::block / 32) * GROUPS + g);
                        if constexpr (Q::minima)
                            made.minimum[h][g] = Q::minimum(block(h, mine), mine % (Q::block / 32) * GROUPS + g);
                    }
            }
            Scales s;
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    s.scale[h][g] = __shfl_sync(ALL_LANES, made.scale[h][g], run % 4, 4);
                    if constexpr (Q::minima) s.minimum[h][g] = __shfl_sync(ALL_LANES, made.minimum[h][g], run % 4, 4);
                }
            multiply(sums, centred<Q>(Q::words(block(0, run), j, t)), centred<Q>(Q::words(block(1, run), j, t)), s, run, count);
        }
    }

    __device__ __forceinline__ void run(TileSums& sums, const uint8_t* w, int n_rows, int cols, const void* x, int x_rows,
                                        const int* tokens, int count) {
        Sources from(w, n_rows, cols, Activations(x, (int64_t)x_rows * cols), tokens[min(thread_number() / 4, count - 1)]);
        for (int left = cols / 32; left > 0; left -= RUNS) {
            __syncthreads();  // all have read what is overwritten now
            fetch(from, min(RUNS, left), count);
            copy_async_wait<0>();
            __syncthreads();
            multiply_all(sums, from, min(RUNS, left), count);
            from.advance();
        }
    }
};

// ---- types without blocks: float32 products, as the reference has them ----

template <class Q>
struct FloatTile {
    static constexpr int COLUMNS = 32;

    float weights[TILE_WARPS][COLUMNS][17];  // [column][row of the warp's 16]
    __align__(8) float inputs[COLUMNS][TILE_TOKENS + 2];

    __device__ __forceinline__ void run(TileSums& sums, const uint8_t* w, int n_rows, int cols, const void* x, int x_rows,
                                        const int* tokens, int count) {
        const int lane = lane_number(), warp = warp_number(), g = lane / 4, t = lane % 4;
        for (int first = 0; first < cols; first += COLUMNS) {
            const int column = first + lane;
            if (first) __syncthreads();
#pragma unroll 4
            for (int r = 0; r < 16; r++) {
                const uint8_t* row = w + min(16 * warp + r, n_rows - 1) * row_bytes<Q>(cols);
                weights[warp][lane][r] = column < cols ? Q::value(row, column) : 0;
            }
            for (int token = warp; token < count; token += TILE_WARPS)
                inputs[lane][token] = column < cols ? ((const float*)x)[(int64_t)tokens[token] * cols + column] : 0;
            __syncthreads();
#pragma unroll 4
            for (int c = 0; c < COLUMNS; c++) {
                const float low = weights[warp][c][g], high = weights[warp][c][g + 8];
#pragma unroll
                for (int n = 0; n < TILE_TOKENS / 8; n++) {
                    if (8 * n >= count) break;
                    const float2 pair = *(const float2*)&inputs[c][8 * n + 2 * t];
                    float(&to)[4] = sums.at[n];
                    to[0] = fmaf(low, pair.x, to[0]), to[1] = fmaf(low, pair.y, to[1]);
                    to[2] = fmaf(high, pair.x, to[2]), to[3] = fmaf(high, pair.y, to[3]);
                }
            }
        }
    }
};

template <class Q, bool blocks = (Q::block > 1)>
struct TileOf : BlockTile<Q> {};
template <class Q>
struct TileOf<Q, false> : FloatTile<Q> {};

// The tile of rows 0 … 127 of W, of which n_rows are there, and of rows tokens[0 … count - 1] of x [x_rows, cols]; by the block.
template <class Q>
__device__ __forceinline__ TileSums tile(const uint8_t* w, int n_rows, int cols, const void* x, int x_rows, const int* tokens,
                                         int count) {
    __shared__ TileOf<Q> shared;
    TileSums sums;
    shared.run(sums, w, n_rows, cols, x, x_rows, tokens, count);
    return sums;
}
