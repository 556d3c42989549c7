// Causal attention over a cache of any KV type, with grouped query heads and online softmax, in two forms. `#define KV F16` and
// `#define HEAD 128` (keys' and values' columns) stand in front of the text.
//
// attention, for few tokens: one warp keeps 8 queries and their sums in registers and walks over its share of the cache, 8 columns
// a lane. It reads each key and value once for all query heads of the group, in float32. Bytes: pos * n_head_kv * (a key and a
// value) for every 8 queries; arithmetic is 4 * HEAD * 8 operations a position, 16 a byte of float16: the memory is the bound.
//
// attention_many, for prefill: tensor cores, 64 queries (tokens x heads of a group) against 32 positions at a time, queries, keys
// and weights rounded to float16, sums in float32. 4 * HEAD operations for each pair of a query and a position it sees; a tile's
// bytes serve 64 queries, so arithmetic is the bound, and the loads of one block hide behind the products of another.
//
// The grid may not depend on the position, because a recorded step keeps it: the cache is cut into gridDim ranges, each a share
// of what is filled, and attention_combine adds the ranges up. Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax); Dao
// et al. 2022 and 2023, arXiv:2205.14135, 2307.08691 (tiles; split over the cache).
//
// Caches are uint8 [n_ctx, n_head_kv, bytes of a head]; q and out float32 [n_tokens, n_head, HEAD]; query i of a KV head is token
// i / group, head i % group of its group. Token t sees positions 0 … pos + t. With one range `out` is the result, with more it is
// scratch [n_tokens * n_head, ranges, HEAD + 2]: weighted sum, largest score (log2), sum of weights. Scores carry a factor log2 e.

constexpr int HEAD_BYTES = HEAD / KV::block * KV::nbytes, PARTIAL = HEAD + 2, MOST_RANGES = 64;
constexpr float LOG2_E = 1.44269504f;

// What a block works on: the queries first … of one KV head, and one range of the cache.
struct Item {
    int first, kv_head, range, ranges, n_head, n_head_kv, group, n_query;

    __device__ int token(int i) const { return i / group; }
    __device__ int row(int i) const { return token(i) * n_head + kv_head * group + i % group; }
    // Byte address of the head at a position of a cache.
    __device__ const uint8_t* head(const uint8_t* cache, int position) const {
        return cache + ((int64_t)position * n_head_kv + kv_head) * HEAD_BYTES;
    }
    // The first of `n` positions, in tiles, that this range does not hold; of the range before it: the first that it does.
    __device__ int end(int range, int n, int tile) const {
        const int tiles = divide_up(n, tile);
        return min(tiles * range / ranges * tile, n);
    }
    // Where column d of query i goes, and by what it is to be multiplied.
    __device__ float* result(float* out, int i) const {
        return ranges == 1 ? out + (int64_t)row(i) * HEAD : out + ((int64_t)row(i) * ranges + range) * PARTIAL;
    }
};

// What scores are compared with: without any (-inf), 0 keeps exp2(score - largest) from being NaN.
__device__ inline float finite(float largest) { return largest == Max::nothing() ? 0.0f : largest; }

// Columns d … d + 7 of a head, of which a query is one in float32.
__device__ __forceinline__ void load_columns(float (&x)[8], const float* head, int d) {
    const float4 low = *(const float4*)(head + d), high = *(const float4*)(head + d + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

template <class Q>
__device__ __forceinline__ void load_columns(float (&x)[8], const uint8_t* head, int d) {
    if constexpr (Q::block == 1) {  // then a head is a multiple of 16 bytes
        constexpr int each = 16 / Q::nbytes;
#pragma unroll
        for (int i = 0; i < 8; i += each) Q::unpack(load_16(head + (d + i) * Q::nbytes), *(float(*)[each])&x[i]);
    } else {
        Q::values(head, d, x);
    }
}

// ---- few tokens ----

constexpr int ROWS = 8, WARPS = 4;                                                // queries of a block; its warps
constexpr int SHARERS = HEAD <= 64 ? 8 : HEAD <= 128 ? 16 : 32;                   // lanes that share a position
constexpr int AT_ONCE = 32 / SHARERS, TURNS = 4, CHUNK = AT_ONCE * TURNS;         // positions of a warp at a time
static_assert(HEAD % 8 == 0 && HEAD <= 256 && KV::block <= 32, "a lane holds 8 columns");

// Each lane brings 8 numbers; lane l gets the sum of the number l % 8 over the lanes that share its position.
__device__ inline float sums_of_rows(float (&x)[ROWS], int lane) {
#pragma unroll
    for (int half = 4; half; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; i++) {  // give away the half of the rows that belongs to the other lane
            const bool upper = lane & half;
            const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
            x[i] = kept + __shfl_xor_sync(ALL_LANES, given, half);
        }
    }
#pragma unroll
    for (int lanes = 8; lanes < SHARERS; lanes *= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], lanes);
    return x[0];
}

// The part of a warp: its lanes hold, of 8 columns each, the queries and the weighted sums, and of query l % 8 the state.
struct Walk {
    float query[ROWS][8], sum[ROWS][8], largest = Max::nothing(), weights = 0;

    __device__ void begin(const Item& item, const float* q, float scale, int lane) {
        const int column = lane % SHARERS * 8, own = item.row(min(item.first + lane % ROWS, item.n_query - 1));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            load_columns(query[r], q + (int64_t)__shfl_sync(ALL_LANES, own, r) * HEAD, min(column, HEAD - 8));
#pragma unroll
            for (int c = 0; c < 8; c++) {
                query[r][c] *= column < HEAD ? scale : 0;
                sum[r][c] = 0;
            }
        }
    }

    // CHUNK positions from `start` on, as far as they are before `end`; query l % 8 of this lane sees those before `seen`.
    __device__ void visit(const Item& item, const uint8_t* keys, const uint8_t* values, int start, int end, int seen, int lane) {
        const int column = min(lane % SHARERS * 8, HEAD - 8), own = start + lane / SHARERS;
        float x[TURNS][8], y[TURNS][8], score[TURNS], most = largest;
        // Beyond the end the last head serves, with a score of -inf: no load waits for a branch, or for one before it.
#pragma unroll
        for (int u = 0; u < TURNS; u++) load_columns<KV>(x[u], item.head(keys, min(own + u * AT_ONCE, end - 1)), column);
#pragma unroll
        for (int u = 0; u < TURNS; u++) load_columns<KV>(y[u], item.head(values, min(own + u * AT_ONCE, end - 1)), column);
#pragma unroll
        for (int u = 0; u < TURNS; u++) {
            float product[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                product[r] = 0;
#pragma unroll
                for (int c = 0; c < 8; c++) product[r] += query[r][c] * x[u][c];
            }
            score[u] = sums_of_rows(product, lane);
            if (own + u * AT_ONCE >= min(end, seen)) score[u] = Max::nothing();
            most = fmaxf(most, score[u]);
        }
#pragma unroll
        for (int lanes = SHARERS; lanes < 32; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, lanes));
        const float shrink = exp2f(largest - finite(most));
        largest = most;
        weights *= shrink;
        const bool shrinks = __any_sync(ALL_LANES, shrink != 1.0f);
#pragma unroll
        for (int u = 0; u < TURNS; u++) weights += score[u] = exp2f(score[u] - finite(most));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int holder = lane / 8 * 8 + r;
            if (shrinks) {
                const float factor = __shfl_sync(ALL_LANES, shrink, holder);
#pragma unroll
                for (int c = 0; c < 8; c++) sum[r][c] *= factor;
            }
#pragma unroll
            for (int u = 0; u < TURNS; u++) {
                const float weight = __shfl_sync(ALL_LANES, score[u], holder);
#pragma unroll
                for (int c = 0; c < 8; c++) sum[r][c] += weight * y[u][c];
            }
        }
    }

    // Add up the positions that lanes have looked at side by side, and leave all in part[row].
    __device__ void leave(float (*part)[PARTIAL], int lane) {
#pragma unroll
        for (int lanes = SHARERS; lanes < 32; lanes *= 2) {
            weights += __shfl_xor_sync(ALL_LANES, weights, lanes);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < 8; c++) sum[r][c] += __shfl_xor_sync(ALL_LANES, sum[r][c], lanes);
        }
        if (lane < SHARERS && lane * 8 < HEAD)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < 8; c++) part[r][lane * 8 + c] = sum[r][c];
        if (lane < ROWS) part[lane][HEAD] = largest, part[lane][HEAD + 1] = weights;
    }
};

// Grid (ranges, n_head_kv, queries of a KV head / 8), block 128.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
attention(float* out, const float* q, const uint8_t* keys, const uint8_t* values, const int* pos, int n_tokens, int n_head,
          int n_head_kv, float scale) {
    __shared__ float parts[WARPS][ROWS][PARTIAL];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), group = n_head / n_head_kv;
    const Item item = {(int)blockIdx.z * ROWS, (int)blockIdx.y, (int)blockIdx.x, (int)gridDim.x, n_head, n_head_kv, group, n_tokens * group};
    const int n = pos[0] + n_tokens, end = item.end(item.range + 1, n, CHUNK);
    const int seen = pos[0] + item.token(item.first + lane % ROWS) + 1;
    Walk walk;
    walk.begin(item, q, scale * LOG2_E, lane);
    for (int start = item.end(item.range, n, CHUNK) + warp * CHUNK; start < end; start += WARPS * CHUNK)
        walk.visit(item, keys, values, start, end, seen, lane);
    walk.leave(parts[warp], lane);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * HEAD; i += 32 * WARPS) {
        const int r = i / HEAD, d = i % HEAD;
        if (item.first + r >= item.n_query) break;
        float largest = Max::nothing(), sum = 0, weights = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, parts[w][r][HEAD]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2f(parts[w][r][HEAD] - finite(largest));
            sum += weight * parts[w][r][d];
            weights += weight * parts[w][r][HEAD + 1];
        }
        float* to = item.result(out, item.first + r);
        to[d] = item.ranges == 1 ? sum / weights : sum;
        if (item.ranges > 1 && d == 0) to[HEAD] = largest, to[HEAD + 1] = weights;
    }
}

// out [n_rows, HEAD] from what the ranges (at most MOST_RANGES) left. Grid (n_rows), block 128.
extern "C" __global__ void __launch_bounds__(128) attention_combine(float* out, const float* partial, int ranges) {
    __shared__ float share[MOST_RANGES];
    partial += (int64_t)blockIdx.x * ranges * PARTIAL;
    if (threadIdx.x < 32) {
        float largest = Max::nothing(), weights = 0;
        for (int s = threadIdx.x; s < ranges; s += 32) largest = fmaxf(largest, partial[s * PARTIAL + HEAD]);
        largest = finite(warp_max(largest));
        for (int s = threadIdx.x; s < ranges; s += 32) {
            share[s] = exp2f(partial[s * PARTIAL + HEAD] - largest);
            weights += share[s] * partial[s * PARTIAL + HEAD + 1];
        }
        weights = warp_sum(weights);
        for (int s = threadIdx.x; s < ranges; s += 32) share[s] /= weights;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < HEAD; d += 128) {
        float sum = 0;
#pragma unroll 8
        for (int s = 0; s < ranges; s++) sum += share[s] * partial[s * PARTIAL + d];
        out[(int64_t)blockIdx.x * HEAD + d] = sum;
    }
}

// ---- many tokens ----

constexpr int QUERIES = 64, TILE = 32;    // of a block; positions at a time
constexpr int PIECES = HEAD / 8;          // of 8 columns, 16 bytes, in a row of shared memory
constexpr int LINE = PIECES < 8 ? PIECES : 8;
static_assert(HEAD % 16 == 0 && (PIECES & (LINE - 1)) == 0, "rows are whole fragments, and pieces change places within a line");

// The address of a piece: rows exchange their pieces, so that the 8 rows that ldmatrix reads at once lie in different banks.
__device__ inline uint16_t* piece(uint16_t* matrix, int row, int p) {
    return matrix + row * HEAD + (p ^ (row * LINE / 8 & (LINE - 1))) * 8;
}

__device__ __forceinline__ uint4 halves(const float (&x)[8], float scale) {
    return make_uint4(floats_to_half2(x[0] * scale, x[1] * scale), floats_to_half2(x[2] * scale, x[3] * scale),
                      floats_to_half2(x[4] * scale, x[5] * scale), floats_to_half2(x[6] * scale, x[7] * scale));
}

// Columns d … d + 7 of a head as float16.
template <class Q>
__device__ __forceinline__ uint4 load_halves(const uint8_t* head, int d) {
    if constexpr (Q::block == 1 && Q::nbytes == 2) return load_16(head + 2 * d);  // it is float16 that caches keep in 2 bytes
    float x[8];
    load_columns<Q>(x, head, d);
    return halves(x, 1);
}

// tile [TILE, HEAD] = the heads from `start` on; beyond the end the last one, of which nobody sees anything.
__device__ inline void load_tile(uint16_t* tile, const Item& item, const uint8_t* cache, int start, int end) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * PIECES; i += 128) {
        const uint8_t* head = item.head(cache, min(start + i / PIECES, end - 1));
        *(uint4*)piece(tile, i / PIECES, i % PIECES) = load_halves<KV>(head, i % PIECES * 8);
    }
}

// What a warp holds of 16 queries: fragments of scores and sums, and the state of rows lane / 4 and lane / 4 + 8.
struct Rows16 {
    float score[TILE / 8][4], sum[HEAD / 8][4], largest[2] = {Max::nothing(), Max::nothing()}, weights[2] = {0, 0};

    // score = queries · keysᵀ
    __device__ void multiply_keys(uint16_t* queries, uint16_t* keys, int first, int lane) {
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[j][i] = 0;
#pragma unroll
        for (int k = 0; k < HEAD / 16; k++) {
            uint32_t a[4], b[4];
            ldmatrix(a, piece(queries, first + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int j = 0; j < TILE / 16; j++) {
                ldmatrix(b, piece(keys, 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                mma_f16(score[2 * j], a, {b[0], b[1]});
                mma_f16(score[2 * j + 1], a, {b[2], b[3]});
            }
        }
    }

    // Scores become weights; row h of this lane sees `seen[h]` positions of the tile.
    __device__ void weigh(const int (&seen)[2], int lane) {
        bool shrinks = false;
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = largest[h];
#pragma unroll
            for (int j = 0; j < TILE / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& s = score[j][2 * h + i];
                    if (8 * j + lane % 4 * 2 + i >= seen[h]) s = Max::nothing();
                    most = fmaxf(most, s);
                }
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            shrink[h] = exp2f(largest[h] - finite(most));
            shrinks |= shrink[h] != 1.0f;
            largest[h] = most;
            weights[h] *= shrink[h];
#pragma unroll
            for (int j = 0; j < TILE / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& s = score[j][2 * h + i];
                    weights[h] += s = exp2f(s - finite(most));
                }
        }
        if (__any_sync(ALL_LANES, shrinks))
#pragma unroll
            for (int j = 0; j < HEAD / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) sum[j][i] *= shrink[i / 2];
    }

    // sum += weights · values: the scores' fragments are those of a left factor.
    __device__ void multiply_values(uint16_t* values, int lane) {
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            const uint32_t a[4] = {
                floats_to_half2(score[2 * k][0], score[2 * k][1]), floats_to_half2(score[2 * k][2], score[2 * k][3]),
                floats_to_half2(score[2 * k + 1][0], score[2 * k + 1][1]), floats_to_half2(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (int j = 0; j < HEAD / 16; j++) {
                uint32_t b[4];
                ldmatrix<true>(b, piece(values, 16 * k + lane % 16, 2 * j + lane / 16));
                mma_f16(sum[2 * j], a, {b[0], b[1]});
                mma_f16(sum[2 * j + 1], a, {b[2], b[3]});
            }
        }
    }

    __device__ void finish(const Item& item, float* out, int first, int lane) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            weights[h] += __shfl_xor_sync(ALL_LANES, weights[h], 1);
            weights[h] += __shfl_xor_sync(ALL_LANES, weights[h], 2);
            const int i = item.first + first + 8 * h + lane / 4;
            if (i >= item.n_query) continue;
            float* to = item.result(out, i);
            const float factor = item.ranges == 1 ? 1.0f / weights[h] : 1.0f;
#pragma unroll
            for (int j = 0; j < HEAD / 8; j++)
                *(float2*)(to + 8 * j + lane % 4 * 2) = make_float2(sum[j][2 * h] * factor, sum[j][2 * h + 1] * factor);
            if (item.ranges > 1 && lane % 4 == 0) to[HEAD] = largest[h], to[HEAD + 1] = weights[h];
        }
    }
};

// Grid (queries of a KV head / 64, n_head_kv, ranges), block 128: a warp takes 16 queries.
extern "C" __global__ void __launch_bounds__(128, 2)
attention_many(float* out, const float* q, const uint8_t* keys, const uint8_t* values, const int* pos, int n_tokens, int n_head,
               int n_head_kv, float scale) {
    __shared__ __align__(16) uint16_t queries[QUERIES * HEAD], tile[TILE * HEAD];  // 48 KB for heads of 256
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, group = n_head / n_head_kv;
    const int block = gridDim.x - 1 - blockIdx.x;  // the last tokens see most and come first
    const Item item = {block * QUERIES, (int)blockIdx.y, (int)blockIdx.z, (int)gridDim.z, n_head, n_head_kv, group, n_tokens * group};
    const int past = pos[0], n = past + item.token(min(item.first + QUERIES, item.n_query) - 1) + 1;
    const int end = item.end(item.range + 1, n, TILE);
    for (int i = threadIdx.x; i < QUERIES * PIECES; i += 128) {
        const int query = min(item.first + i / PIECES, item.n_query - 1);
        float x[8];
        load_columns(x, q + (int64_t)item.row(query) * HEAD, i % PIECES * 8);
        *(uint4*)piece(queries, i / PIECES, i % PIECES) = halves(x, scale * LOG2_E);
    }
    Rows16 rows;
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) rows.sum[j][i] = 0;
    for (int start = item.end(item.range, n, TILE); start < end; start += TILE) {
        __syncthreads();  // the queries are there; nobody reads the last tile any more
        load_tile(tile, item, keys, start, end);
        __syncthreads();
        rows.multiply_keys(queries, tile, first, lane);
        __syncthreads();
        load_tile(tile, item, values, start, end);
        int seen[2];
        for (int h = 0; h < 2; h++) seen[h] = past + item.token(item.first + first + 8 * h + lane / 4) + 1 - start;
        rows.weigh(seen, lane);
        __syncthreads();
        rows.multiply_values(tile, lane);
    }
    rows.finish(item, out, first, lane);
}
