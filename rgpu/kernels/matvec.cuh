// Few tokens: rows of W stream through shared memory, each read once for all tokens, and are multiplied with x where it lies.
//
// Bytes: those of the rows; x is small and comes from the caches. Bound: memory bandwidth. On the widest GPUs that takes 30 KB
// under way per multiprocessor, and there is time for 3 instructions a weight of 4 bits. So every warp copies ahead on its own,
// 16 bytes a lane whatever the alignment of the type, and computes on what came before, without barriers of the block.
//
// A lane takes 32 weights (one scale of x) of each of ROWS rows, so that x is read once for ROWS of them. Short rows are shared
// by 16 or 8 lanes, and the warp takes 2 or 4 times as many. Sums run along the lane's columns, then over lanes as a tree: the
// same bits for any grid and any number of tokens.

constexpr int ROWS = 2;    // of W, multiplied by a lane at once
constexpr int STAGES = 2;  // pieces of rows under way or in use, of a warp

// Lanes that share a row: the most that are not left idle by the end of the row, but for long rows.
__device__ inline int sharers(int cols) {
    const int runs = cols / 32;
    return runs % 32 == 0 || runs > 64 ? 32 : runs % 16 == 0 || runs > 32 ? 16 : 8;
}

// Rows that a warp multiplies at once: a group.
template <class Q>
__device__ int group_rows(int cols) {
    return Q::block == 1 ? 1 : ROWS * (WARP / sharers(cols));
}

template <class Q>
__device__ int64_t row_bytes(int cols) {
    return (int64_t)(cols / Q::block) * Q::nbytes;
}

// ---- types of blocks ----

// Bytes of 8 runs of 32 weights, one block or 8.
template <class Q>
constexpr int BYTES_OF_8 = 256 / Q::block * Q::nbytes;

// From row to row in shared memory; a row's piece, of 32 weights for each lane, lies as far from a multiple of 16 as in memory.
template <class Q>
__device__ constexpr int pitch(int lanes) {
    return (lanes / 8 * BYTES_OF_8<Q> + 15) / 16 * 16 + (Q::nbytes % 16 ? 16 : 0);
}

// Shared memory of a warp; ops/cuda.py computes the same. The most is needed by 8 lanes a row, for the rounding.
template <class Q>
constexpr int STAGE_BYTES = Q::block == 1 ? 0 : ROWS * 4 * pitch<Q>(8);

template <class Q>
constexpr int WARP_BYTES = STAGES * STAGE_BYTES<Q>;

__device__ __forceinline__ int skew(const uint8_t* p) { return (int)(uint64_t)p & 15; }

// 32 activations of a token, for products with a type.
template <class Q>
struct Inputs {
    int q[8], first, last;  // four int8 each; the sums of the first 16 and of the last 16
    float scale, sum;

    __device__ __forceinline__ Inputs(const Activations& x, int64_t run) {
        const uint4 a = load_16(x.q + 32 * run), b = load_16(x.q + 32 * run + 16);
        q[0] = a.x, q[1] = a.y, q[2] = a.z, q[3] = a.w, q[4] = b.x, q[5] = b.y, q[6] = b.z, q[7] = b.w;
        scale = x.scale[run];
        if constexpr (Q::minima && Q::group == 32) sum = x.sum[run];
    }
    // x itself has sums of 32 only.
    __device__ __forceinline__ void add_up() {
        first = last = 0;
        if constexpr (Q::zero || (Q::minima && Q::group == 16))
#pragma unroll
            for (int i = 0; i < 4; i++) first = __dp4a(0x01010101, q[i], first), last = __dp4a(0x01010101, q[i + 4], last);
    }
};

// The 32 weights they meet, run `j` of a block.
template <class Q>
struct Weights {
    static constexpr int GROUPS = 32 / Q::group;
    int q[8];
    float scale[GROUPS], minimum[GROUPS];

    __device__ __forceinline__ void load(Block<Q, RUNS> w, int j) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int2 pair = Q::words(w, j, i);
            q[i] = pair.x, q[i + 4] = pair.y;
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            scale[g] = Q::scale(w, j * GROUPS + g);
            if constexpr (Q::minima) minimum[g] = Q::minimum(w, j * GROUPS + g);
        }
    }

    __device__ __forceinline__ float add_product(const Inputs<Q>& x, float sum) const {
        int first = -Q::zero * x.first, last = -Q::zero * x.last;
#pragma unroll
        for (int i = 0; i < 4; i++) first = __dp4a(q[i], x.q[i], first), last = __dp4a(q[i + 4], x.q[i + 4], last);
        if constexpr (Q::group == 32) {
            sum = fmaf(scale[0] * x.scale, (float)(first + last), sum);
            if constexpr (Q::minima) sum = fmaf(-minimum[0], x.sum, sum);
            return sum;
        } else {
            float y = fmaf(scale[0], (float)first, scale[1] * (float)last);
            if constexpr (Q::minima) y = fmaf(-minimum[0], (float)x.first, fmaf(-minimum[1], (float)x.last, y));
            return fmaf(x.scale, y, sum);
        }
    }
};

// The pieces of the rows that a lane copies and multiplies, one in each of its ROWS rows, in the order of the stream.
template <class Q>
struct Pieces {
    const uint8_t* at[ROWS];
    int left;  // bytes of the rows from here on

    // Of the rows `row` + r · apart, or of the last where there is none.
    __device__ __forceinline__ void begin(const uint8_t* w, int row, int apart, int rows, int cols) {
        left = cols / Q::block * Q::nbytes;
#pragma unroll
        for (int r = 0; r < ROWS; r++) at[r] = w + (int64_t)min(row + r * apart, rows - 1) * left;
    }
    __device__ __forceinline__ void advance(int nbytes) {
        left -= nbytes;
#pragma unroll
        for (int r = 0; r < ROWS; r++) at[r] += nbytes;
    }
};

// Every `step`th group of rows from group `first` on, as one stream; `stage` is the warp's own, WARP_BYTES of it.
template <class Q, int N, class Emit>
__device__ __forceinline__ void multiply_blocks(const uint8_t* w, int rows, int cols, const Activations& x, int n, int first,
                                                int step, uint8_t* stage, Emit emit) {
    constexpr int COPIES = (divide_up(BYTES_OF_8<Q>, 16) + 1 + 7) / 8;  // of a lane for its share of a piece
    const int lanes = sharers(cols), apart = WARP / lanes, runs = cols / 32, length = lanes / 8 * BYTES_OF_8<Q>;
    // A lane copies and multiplies, with the other sharers, the rows `mine` + r · apart of a group: its run `own` of each piece,
    // which is run j of a block.
    const unsigned own = lane_number() % lanes, mine = lane_number() / lanes, j = own % (Q::block / 32);
    const int group = ROWS * apart, between = apart * pitch<Q>(lanes);
    uint8_t* to = stage + mine * pitch<Q>(lanes) + 16 * own;
    const uint8_t* from = stage + mine * pitch<Q>(lanes) + own * 32 / Q::block * Q::nbytes;

    int ahead_row = first * group, s = 0;  // of the group; byte of the stage
    Pieces<Q> ahead, here;
    ahead.begin(w, ahead_row + mine, apart, rows, cols);
    auto fetch = [&]() {
        if (ahead_row < rows) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int before = Q::nbytes % 16 ? skew(ahead.at[r]) : 0;
                const int end = before + min(ahead.left, length) - 16 * (int)own;
                const uint8_t* start = ahead.at[r] - before + 16 * own;
#pragma unroll
                for (int i = 0; i < COPIES; i++)
                    if (16 * i * lanes < end) copy_async_16(to + s + r * between + 16 * i * lanes, start + 16 * i * lanes);
            }
            ahead.advance(length);
            if (ahead.left <= 0) ahead_row += step * group, ahead.begin(w, ahead_row + mine, apart, rows, cols);
        }
        copy_async_commit();
        s = s == (STAGES - 1) * STAGE_BYTES<Q> ? 0 : s + STAGE_BYTES<Q>;
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch();

    for (int row = first * group; row < rows; row += step * group) {
        float sums[N][ROWS] = {};
        here.begin(w, row + mine, apart, rows, cols);
        for (int run = own; run - (int)own < runs; run += lanes) {
            const bool present = run < runs;
            Inputs<Q> x0(x, present ? run : 0);  // on its way while the weights come
            copy_async_wait<STAGES - 1>();
            __syncwarp();
            if (present) {
                Weights<Q> weights[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    weights[r].load({from + s + r * between + (Q::nbytes % 16 ? skew(here.at[r]) : 0)}, j);
#pragma unroll
                for (int t = 0; t < N; t++) {
                    if (t > 0 && t >= n) break;
                    Inputs<Q> xt = t == 0 ? x0 : Inputs<Q>(x, (int64_t)t * runs + run);
                    xt.add_up();
#pragma unroll
                    for (int r = 0; r < ROWS; r++) sums[t][r] = weights[r].add_product(xt, sums[t][r]);
                }
            }
            here.advance(length);
            __syncwarp();  // all have read what is overwritten now
            fetch();
        }
#pragma unroll
        for (int t = 0; t < N; t++) {
            if (t > 0 && t >= n) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                for (int o = lanes / 2; o; o /= 2) sums[t][r] += __shfl_xor_sync(ALL_LANES, sums[t][r], o);
                const int result = row + mine + r * apart;
                if (own == 0 && result < rows) emit(result, t, sums[t][r]);
            }
        }
    }
}

// ---- types without blocks: x is float32, and a row goes through registers ----

template <class Q, int N, class Emit>
__device__ __forceinline__ void multiply_floats(const uint8_t* w, int rows, int cols, const float* x, int n, int first, int step,
                                                Emit emit) {
    constexpr int HELD = 16 / Q::nbytes;
    const int lane = lane_number();
    for (int row = first; row < rows; row += step) {
        const uint8_t* from = w + row * row_bytes<Q>(cols);
        float sums[N] = {};
        if (cols % HELD == 0) {
#pragma unroll(N == 1 ? 32 / HELD : 2)  // loads that are under way together
            for (int c = HELD * lane; c < cols; c += HELD * WARP) {
                float values[HELD];
                Q::unpack(load_16(from + c * Q::nbytes), values);
#pragma unroll
                for (int t = 0; t < N; t++) {
                    if (t >= n) break;
#pragma unroll
                    for (int i = 0; i < HELD; i += 4) {
                        const float4 v = *(const float4*)(x + (int64_t)t * cols + c + i);
                        sums[t] = fmaf(values[i], v.x, fmaf(values[i + 1], v.y, sums[t]));
                        sums[t] = fmaf(values[i + 2], v.z, fmaf(values[i + 3], v.w, sums[t]));
                    }
                }
            }
        } else {
            for (int c = lane; c < cols; c += WARP)
#pragma unroll
                for (int t = 0; t < N; t++)
                    if (t < n) sums[t] = fmaf(Q::value(from, c), x[(int64_t)t * cols + c], sums[t]);
        }
#pragma unroll
        for (int t = 0; t < N; t++) {
            if (t >= n) break;
            const float sum = warp_sum(sums[t]);
            if (lane == 0) emit(row, t, sum);
        }
    }
}

// emit(row, t, y) for y = row `row` of W [rows, cols] times token t of n <= N: by a warp, for every `step`th group of rows from
// group `first` on. x [x_rows, cols], of which rows `token` and on are multiplied: int8 blocks, or float32 if Q has no blocks.
template <class Q, int N, class Emit>
__device__ __forceinline__ void multiply(const uint8_t* w, int rows, int cols, const void* x, int x_rows, int token, int n,
                                         int first, int step, uint8_t* stage, Emit emit) {
    if constexpr (Q::block == 1) {
        multiply_floats<Q, N>(w, rows, cols, (const float*)x + (int64_t)token * cols, n, first, step, emit);
    } else {
        Activations from(x, (int64_t)x_rows * cols);
        const int64_t before = (int64_t)token * cols;
        from.q += before, from.scale += before / 32, from.sum += before / 32;
        multiply_blocks<Q, N>(w, rows, cols, from, n, first, step, stage, emit);
    }
}
