// The experts' feed-forward: h = silu(gate · x)·(up · x), then out += weight·(down · h), for few tokens and for many.
//
// A pair is token·k + rank: one expert for one token. `table` maps an expert to its slot, or -1: not done here; `gates`, `ups`,
// `downs` hold each slot's address. A token's sum runs over its experts in ascending order, whatever the grid: no atomics.
//
// Few tokens go pair by pair in two kernels. Bytes: the matrices of every pair (14 MB for 8 experts of 3 · 512 · 2048 weights in
// Q4_K); x and h come from the caches. Bound: memory bandwidth. gate_up makes 32 values of h in a block, because these are one
// int8 block of down's input; down gives each pair of a token to a warp of its own, so that all are under way together.
//
// Many tokens are grouped by expert on the device, and the host need not know the sizes: group_by_expert lists the pairs of each
// expert and the tiles of 64 of them; product_many multiplies the tiles (tile.cuh) for gate, for up and for down into a float per
// pair and row; swiglu_many stands between, combine at the end. Bound: the products' arithmetic. Bytes beside those of the
// products: for each pair 18 · n_ff (gate and up written and read, h written) and 8 · n_embd.
//
// The text is compiled as it is for the kernels without weights, after `#define GATE Q4_K` and `#define UP Q4_K` for gate_up,
// after `#define WEIGHT Q4_K` for down and product_many.

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

constexpr int MOST_USED = WARP;  // experts of a token

// How many of a token's k experts come before the one of `rank`; the first k lanes of a warp bring their ids.
__device__ inline int place(int id, int k, int rank) {
    const int lane = lane_number(), other = __shfl_sync(ALL_LANES, id, rank);
    return __popc(__ballot_sync(ALL_LANES, lane < k && (id < other || (id == other && lane < rank))));
}

#if defined(GATE)

template <class A, class B>
constexpr bool SAME = false;
template <class A>
constexpr bool SAME<A, A> = true;

// h of pairs: float32 [n_pairs, rows] if h_floats, else int8 blocks; pairs without a slot are left out. x_gate, x_up: x
// [n_tokens, cols] as each type wants it. Grid (rows / 32 rounded up, n_tokens · k), block (32, an even number): half for gate.
extern "C" __global__ void __launch_bounds__(512, 1)
gate_up(uint8_t* h, int h_floats, const int64_t* gates, const int64_t* ups, const int* table, const int* ids, const void* x_gate,
        const void* x_up, int n_tokens, int k, int rows, int cols) {
    extern __shared__ uint4 stages[];
    __shared__ float products[2][32];
    constexpr int BYTES = WARP_BYTES<GATE> > WARP_BYTES<UP> ? WARP_BYTES<GATE> : WARP_BYTES<UP>;
    const int pair = blockIdx.y, slot = table[ids[pair]];
    if (slot < 0) return;
    const int first = 32 * blockIdx.x, n = min(32, rows - first), side = threadIdx.y % 2, lane = threadIdx.x;
    const int token = pair / k, warp = threadIdx.y / 2, warps = blockDim.y / 2;
    const uint8_t* matrix = (const uint8_t*)(side == 0 ? gates : ups)[slot];
    const void* x = side == 0 ? x_gate : x_up;
    uint8_t* stage = (uint8_t*)stages + threadIdx.y * BYTES;
    auto keep = [&](int row, int, float y) { products[side][row] = y; };
    if (SAME<GATE, UP> || side == 0)
        multiply<GATE, 1>(matrix + first * row_bytes<GATE>(cols), n, cols, x, n_tokens, token, 1, warp, warps, stage, keep);
    else
        multiply<UP, 1>(matrix + first * row_bytes<UP>(cols), n, cols, x, n_tokens, token, 1, warp, warps, stage, keep);
    __syncthreads();
    if (threadIdx.y > 0) return;
    const float y = lane < n ? silu(products[0][lane]) * products[1][lane] : 0;
    const int64_t i = (int64_t)pair * rows + first + lane;
    if (!h_floats)
        quantize_block(h, (int64_t)gridDim.y * rows, i, y);
    else if (lane < n)
        ((float*)h)[i] = y;
}

#elif defined(WEIGHT)

constexpr int MOST_ROWS = 4 * ROWS;  // of a group

// out [n_tokens, rows] += the products of each token's pairs with their rows of h (float32, or int8 blocks of n_tokens · k rows).
// A block takes max(1, warps / k) groups of rows of one token, and a warp one group for one pair. Block (32, at most 16); grid
// (groups of all rows / groups of a block, rounded up, n_tokens); k <= 32.
extern "C" __global__ void __launch_bounds__(512, 1)
down(float* out, const int64_t* downs, const int* table, const int* ids, const float* weights, const void* h, int n_tokens, int k,
     int rows, int cols) {
    extern __shared__ uint4 stages[];
    __shared__ float products[MOST_USED][MOST_ROWS];
    const int token = blockIdx.y, warps = blockDim.y, groups = max(1, warps / k), high = group_rows<WEIGHT>(cols);
    const int first = blockIdx.x * groups, lane = threadIdx.x;
    const int id = lane < k ? ids[token * k + lane] : 0;
    uint8_t* stage = (uint8_t*)stages + threadIdx.y * WARP_BYTES<WEIGHT>;
    for (int item = threadIdx.y; item < groups * k; item += warps) {
        const int rank = item % k, group = first + item / k, pair = token * k + rank;
        const int slot = table[__shfl_sync(ALL_LANES, id, rank)];
        float* to = products[item - rank + place(id, k, rank)];
        if (slot < 0) {
            if (lane < high) to[lane] = 0;
            continue;
        }
        const int step = divide_up(rows, high);  // there is no second group
        multiply<WEIGHT, 1>((const uint8_t*)downs[slot], rows, cols, h, n_tokens * k, pair, 1, group, step, stage,
                            [=](int row, int, float y) { to[row - group * high] = weights[pair] * y; });
    }
    __syncthreads();
    for (int i = thread_number(); i < groups * high; i += WARP * warps) {
        const int row = first * high + i;
        if (row >= rows) continue;
        float* sum = out + (int64_t)token * rows + row;
        float y = *sum;
        for (int rank = 0; rank < k; rank++) y += products[i / high * k + rank][i % high];
        *sum = y;
    }
}

// y [n_pairs, rows] = the product of each pair's matrix with row pair / shared_by of x [x_rows, cols] (float32, or int8 blocks);
// pairs without a slot are left out. `groups` is group_by_expert's. Grid (rows / 128 rounded up, n_pairs / 64 + n_expert), block
// (32, 8).
extern "C" __global__ void __launch_bounds__(WARP * TILE_WARPS, 2)
product_many(float* y, const int64_t* matrices, const int* table, const int* groups, const void* x, int x_rows, int shared_by,
             int n_pairs, int n_expert, int rows, int cols) {
    __shared__ int pairs[TILE_TOKENS], tokens[TILE_TOKENS];
    const int *starts = groups, *order = starts + n_expert + 1, *tiles = order + n_pairs;
    const int expert = tiles[blockIdx.y], row = TILE_ROWS * blockIdx.x, thread = thread_number();
    if (expert < 0) return;
    const int slot = table[expert], before = blockIdx.y - (starts[expert] / TILE_TOKENS + expert);  // tiles of this expert
    const int first = starts[expert] + TILE_TOKENS * before;
    const int count = min(TILE_TOKENS, starts[expert + 1] - first);
    if (slot < 0) return;
    if (thread < count) {
        pairs[thread] = order[first + thread];
        tokens[thread] = order[first + thread] / shared_by;
    }
    __syncthreads();
    const uint8_t* w = (const uint8_t*)matrices[slot] + row * row_bytes<WEIGHT>(cols);
    tile<WEIGHT>(w, rows - row, cols, x, x_rows, tokens, count).each([=](int r, int t, float sum) {
        if (row + r < rows && t < count) y[(int64_t)pairs[t] * rows + row + r] = sum;
    });
}

#else

// groups (int32) = starts [n_expert + 1], order [n_pairs], tiles [n_pairs / 64 + n_expert]: the pairs of expert e, in ascending
// order, are order[starts[e]] …; tiles holds the expert of each tile of 64 of them, or -1. A block of 256 threads does an expert.
//
// The first tile of e has number starts[e] / 64 + e, which needs no other expert's count and leaves room for all tiles before.
extern "C" __global__ void __launch_bounds__(256) group_by_expert(int* groups, const int* ids, int n_pairs, int n_expert) {
    __shared__ int smaller[8], equal[8];
    int *starts = groups, *order = starts + n_expert + 1, *tiles = order + n_pairs;
    const int e = blockIdx.x, lane = lane_number(), warp = warp_number();
    // Each warp has a range of pairs, in whole rows of 32.
    const int share = divide_up(divide_up(n_pairs, WARP), 8) * WARP, begin = warp * share, end = min(begin + share, n_pairs);
    int n_smaller = 0, n_equal = 0;
    for (int i = begin; i < end; i += WARP) {
        const int id = i + lane < end ? ids[i + lane] : n_expert;
        n_smaller += __popc(__ballot_sync(ALL_LANES, id < e));
        n_equal += __popc(__ballot_sync(ALL_LANES, id == e));
    }
    if (lane == 0) smaller[warp] = n_smaller, equal[warp] = n_equal;
    __syncthreads();
    int start = 0, count = 0, to = 0;
    for (int i = 0; i < 8; i++) {
        if (i == warp) to = count;
        start += smaller[i], count += equal[i];
    }
    to += start;
    for (int i = begin; i < end; i += WARP) {
        const uint32_t chosen = __ballot_sync(ALL_LANES, i + lane < end && ids[i + lane] == e);
        if (chosen >> lane & 1) order[to + __popc(chosen & ((1u << lane) - 1))] = i + lane;
        to += __popc(chosen);
    }
    const int first = start / TILE_TOKENS + e, last = (start + count) / TILE_TOKENS + e + 1;
    for (int i = first + thread_number(); i < last; i += 256) tiles[i] = i - first < divide_up(count, TILE_TOKENS) ? e : -1;
    if (thread_number() == 0) {
        starts[e] = start;
        if (e == n_expert - 1) starts[n_expert] = n_pairs;
    }
}

// h of pairs = silu(gate)·up, float32 [n_pairs, rows] if h_floats, else int8 blocks; gate, up [n_pairs, rows]; pairs without a
// slot are left out. A warp takes 32 rows of a pair; grid (n_pairs · (rows / 32 rounded up) / 8 rounded up), block (32, 8).
extern "C" __global__ void __launch_bounds__(256) swiglu_many(uint8_t* h, int h_floats, const float* gate, const float* up,
                                                              const int* table, const int* ids, int n_pairs, int rows) {
    const int blocks = divide_up(rows, 32), item = blockIdx.x * 8 + threadIdx.y;
    const int pair = item / blocks, row = item % blocks * 32 + threadIdx.x;
    if (pair >= n_pairs || table[ids[pair]] < 0) return;
    const int64_t i = (int64_t)pair * rows + row;
    const float y = row < rows ? silu(gate[i]) * up[i] : 0;
    if (!h_floats)
        quantize_block(h, (int64_t)n_pairs * rows, i, y);
    else if (row < rows)
        ((float*)h)[i] = y;
}

// out [n_tokens, rows] += weights·y of each token's pairs with a slot; y [n_tokens · k, rows], k <= 32. Grid (rows / 256 rounded
// up, n_tokens), block (256).
extern "C" __global__ void __launch_bounds__(256)
combine(float* out, const float* y, const int* table, const int* ids, const float* weights, int k, int rows) {
    __shared__ int ranks[MOST_USED];
    const int token = blockIdx.y, lane = lane_number(), row = 256 * blockIdx.x + thread_number();
    ids += token * k;
    const int id = lane < k ? ids[lane] : 0;
    for (int rank = warp_number(); rank < k; rank += 8) ranks[place(id, k, rank)] = rank;
    __syncthreads();
    if (row >= rows) return;
    float sum = out[(int64_t)token * rows + row];
    for (int i = 0; i < k; i++) {
        const int pair = token * k + ranks[i];
        if (table[ids[ranks[i]]] >= 0) sum += weights[pair] * y[(int64_t)pair * rows + row];
    }
    out[(int64_t)token * rows + row] = sum;
}

#endif
