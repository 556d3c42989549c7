// The small verbs: rows of floats in, rows of floats out, one value a thread and a turn.
//
// Each value is read and written once, so the bound is bytes over the memory's bandwidth: rms_norm, gate, gate_rows, add and rope
// move 8 to 12 bytes a value (rms_norm's second look at its row hits the L1 cache), swiglu 12, int8 blocks 1.25 more; embed a row
// of the table and 4 bytes a value; store_kv 4 bytes and the cache's type. For one token all of it fits any GPU's cache, and a
// kernel costs its launch. A warp takes 32 neighbouring columns, so one access of a warp is one line, at any row length and
// stride, and a block of x8 (quants/activations.cuh) is what a warp holds: its largest value and its sum take shuffles only.
// `x8` is 0 where no product wants int8; where it is not, rows are a multiple of 32. Outputs may be inputs (but for embed).
//
// The text is compiled as it is; after `#define WEIGHT Q4_K` for embed from that type; after `#define KV F16` for store_kv.

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Loops over values: a thread's first and the distance to its next; the 32 lanes of a warp go round together. Counts are < 2^31.
__device__ inline int first_value() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline int next_value() { return gridDim.x * blockDim.x; }

#if defined(WEIGHT)

// out [n_tokens, n_embd] = rows tokens[t] of the table; blocks (x, t), 8 values a thread.
extern "C" __global__ void embed(float* out, const uint8_t* table, const int* tokens, int n_embd) {
    const uint8_t* row = table + (int64_t)tokens[blockIdx.y] * (n_embd / WEIGHT::block * WEIGHT::nbytes);
    float* to = out + (int64_t)blockIdx.y * n_embd;
    for (int i = 8 * first_value(); i < n_embd; i += 8 * next_value()) {
        float values[8];
        WEIGHT::values(row, i, values);
        for (int j = 0; j < 8; j++) to[i + j] = values[j];
    }
}

#elif defined(KV)

// Rows pos … of the key cache (blocks (x, 0)) and of the value cache (x, 1), uint8 [n_ctx, n_head_kv, bytes of a head], = k and v
// [n_tokens, n_head_kv, d]; k_row, v_row = n_head_kv * d. Heads are whole blocks, so a cache is one long row of them.
extern "C" __global__ void store_kv(uint8_t* k_cache, uint8_t* v_cache, const float* k, const float* v, const int* pos, int n_tokens,
                                    int k_row, int v_row) {
    uint8_t* cache = blockIdx.y ? v_cache : k_cache;
    const float* x = blockIdx.y ? v : k;
    const int row = blockIdx.y ? v_row : k_row;
    const int64_t start = (int64_t)pos[0] * row;
    for (int i = first_value(); i < n_tokens * row; i += next_value()) KV::pack(cache, start + i, x[i]);
}

#else

// out [n_rows, n] = x / sqrt(mean(x²) + eps) * weight; a block takes a row; x has x_stride floats from row to row.
extern "C" __global__ void rms_norm(float* out, const float* x, int x_stride, const float* weight, int n, uint8_t* x8, float eps) {
    const int row = blockIdx.x * n;
    x += (int64_t)blockIdx.x * x_stride;
    float squares = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(block_sum(squares) / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float y = x[i] * scale * weight[i];
        out[row + i] = y;
        if (x8) quantize_block(x8, gridDim.x * n, row + i, y);
    }
}

// out = silu(gate) * up, all [count].
extern "C" __global__ void swiglu(float* out, const float* gate, const float* up, int count, uint8_t* x8) {
    for (int i = first_value(); i < count; i += next_value()) {
        const float y = gate[i] * sigmoid(gate[i]) * up[i];
        out[i] = y;
        if (x8) quantize_block(x8, count, i, y);
    }
}

// out = x * sigmoid(g); x, out [rows, n], count = rows * n; g has g_stride floats from row to row.
extern "C" __global__ void gate(float* out, const float* x, const float* g, int g_stride, int n, int count, uint8_t* x8) {
    for (int i = first_value(); i < count; i += next_value()) {
        const int r = i / n;
        const float y = x[i] * sigmoid(g[(int64_t)r * g_stride + i - r * n]);
        out[i] = y;
        if (x8) quantize_block(x8, count, i, y);
    }
}

// out = x * sigmoid(g) with one g per row.
extern "C" __global__ void gate_rows(float* out, const float* x, const float* g, int g_stride, int n, int count) {
    for (int i = first_value(); i < count; i += next_value()) out[i] = x[i] * sigmoid(g[(int64_t)(i / n) * g_stride]);
}

// out += x.
extern "C" __global__ void add(float* out, const float* x, int count) {
    for (int i = first_value(); i < count; i += next_value()) out[i] += x[i];
}

// out = x, words of 4 bytes.
extern "C" __global__ void copy(uint32_t* out, const uint32_t* x, int count) {
    for (int i = first_value(); i < count; i += next_value()) out[i] = x[i];
}

// out = 0.
extern "C" __global__ void zero(float* out, int count) {
    for (int i = first_value(); i < count; i += next_value()) out[i] = 0;
}

// Rotate the pairs (i, i + n_pairs), i < n_pairs, of each head of x [n_tokens, n_head, d] by (pos + t) * freqs[i], in place; a
// thread takes a pair. sincosf is precise at any angle: at position 262143 the first pair has turned 41,721 times.
extern "C" __global__ void rope(float* x, const int* pos, const float* freqs, int n_tokens, int n_head, int d, int n_pairs) {
    for (int pair = first_value(); pair < n_tokens * n_head * n_pairs; pair += next_value()) {
        const int head = pair / n_pairs, i = pair - head * n_pairs;
        float* a = x + (int64_t)head * d + i;
        float* b = a + n_pairs;
        float sin, cos;
        sincosf((float)(pos[0] + head / n_head) * freqs[i], &sin, &cos);
        const float first = *a, second = *b;
        *a = first * cos - second * sin;
        *b = second * cos + first * sin;
    }
}

constexpr int MOST_EXPERTS = 512, OWNED = MOST_EXPERTS / 32;

// A float's place in the order of floats, as an integer: -0 is 0, NaN the largest; 0 is less than any.
__device__ inline uint32_t order(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return isnan(x) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ids, weights [n_tokens, k] = the k largest of softmax(logits [n_tokens, n_expert]), ties to the lower id, divided by their sum.
//
// A warp takes a token (threadIdx.y numbers the warps of a block), lane l the experts l * owned and on, in registers, so that of
// equal maxima the lowest lane has the lowest id. Softmax divides all by one sum, which the last division cancels. k <= 32.
extern "C" __global__ void route(int* ids, float* weights, const float* logits, int n_tokens, int n_expert, int k) {
    const int t = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x, owned = (n_expert + 31) / 32;
    if (t >= n_tokens) return;
    logits += (int64_t)t * n_expert;
    uint32_t keys[OWNED], best = 0;
    int at = 0, chosen = 0;
#pragma unroll
    for (int j = 0; j < OWNED; j++) {
        const int e = lane * owned + j;
        keys[j] = j < owned && e < n_expert ? order(logits[e]) : 0;
        if (keys[j] > best) best = keys[j], at = j;
    }
    for (int rank = 0; rank < k; rank++) {
        uint32_t largest = best;
        for (int lanes = 16; lanes; lanes /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
        const int winner = __ffs(__ballot_sync(ALL_LANES, best == largest)) - 1;
        const int expert = winner * owned + __shfl_sync(ALL_LANES, at, winner);
        if (lane == rank) chosen = expert;
        if (lane == winner) {
            const int spent = at;
            best = 0;
#pragma unroll
            for (int j = 0; j < OWNED; j++) {
                if (j == spent) keys[j] = 0;
                if (keys[j] > best) best = keys[j], at = j;
            }
        }
    }
    const float logit = logits[chosen], largest = __shfl_sync(ALL_LANES, logit, 0);
    const float weight = lane < k ? expf(logit - largest) : 0, sum = warp_sum(weight);
    if (lane < k) {
        ids[(int64_t)t * k + lane] = chosen;
        weights[(int64_t)t * k + lane] = weight / sum;
    }
}

#endif
