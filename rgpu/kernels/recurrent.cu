// The recurrent half of a hybrid model: short causal convolution, and the gated delta rule. `#define HEAD 128` (columns of a key,
// rows of a state) stands in front of the text.
//
// short_conv reads and writes each channel once per token, 8 bytes, and once per call its weights and tail, 40 bytes for 4 taps.
//
// delta_rule, per V head, with state S [HEAD, d_v], decay exp(g) and step beta (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464):
// S ← exp(g)·S;  d = beta·(v - Sᵀk);  S ← S + k dᵀ;  o = Sᵀq. The columns of S don't see each other, so a warp takes 8 of them and
// holds them in registers from the first token to the last: S is read and written once per call, however many tokens there are.
// One token is bound by these bytes, 8·HEAD·d_v a head; many are bound by arithmetic, 8·HEAD·d_v operations a token and head,
// which the chunked form on the CPU does not save: it saves reading S, and there is nothing of that left to save here.
// Sᵀk and Sᵀq of the old state come from one pass over it: o = exp(g)·Sᵀq + (k·q)·d. Lane l holds column l % 8 and the rows
// 16·i + 4·(l / 8) + 0 … 3, so that a warp's access is whole 32-byte sectors of S and a lane's k and q are 16-byte loads.

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

constexpr int MOST_TAPS = 4, CONV_TOKENS = 32;  // of a thread

// out[t, c] = silu(sum over j of weight[c, j] * x[t - taps + 1 + j, c]); what lies before x is in `tail`, which moves on.
//
// x, out [n_tokens, channels]; weight [channels, taps]; tail [taps - 1, channels], oldest first. A thread takes CONV_TOKENS tokens
// of a channel; grid (channels / block, n_tokens / CONV_TOKENS), rounded up. out must not be x.
extern "C" __global__ void short_conv(float* out, const float* x, const float* weight, float* tail, int n_tokens, int channels, int taps) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    auto input = [=](int t) { return t >= 0 ? x[(int64_t)t * channels + c] : tail[(taps - 1 + t) * channels + c]; };
    const int first = blockIdx.y * CONV_TOKENS, last = min(first + CONV_TOKENS, n_tokens);
    float w[MOST_TAPS], seen[MOST_TAPS];  // aligned to the end; in front of fewer taps there are zeros
#pragma unroll
    for (int j = 0; j < MOST_TAPS; j++) {
        const int tap = j - (MOST_TAPS - taps);
        w[j] = tap >= 0 ? weight[c * taps + tap] : 0;
        seen[j] = tap >= 0 && j < MOST_TAPS - 1 ? input(first - taps + 1 + tap) : 0;
    }
    for (int t = first; t < last; t++) {
        seen[MOST_TAPS - 1] = x[(int64_t)t * channels + c];
        float sum = 0;
#pragma unroll
        for (int j = 0; j < MOST_TAPS; j++) sum += w[j] * seen[j];
        out[(int64_t)t * channels + c] = sum * sigmoid(sum);
#pragma unroll
        for (int j = 0; j < MOST_TAPS - 1; j++) seen[j] = seen[j + 1];
    }
    // Only the first block has read the tail, so only it may write there; in this order it reads before it writes.
    if (blockIdx.y == 0)
        for (int j = 0; j < taps - 1; j++) tail[j * channels + c] = input(n_tokens - taps + 1 + j);
}

constexpr int WARPS = 4, COLUMNS = 8, BATCH = 8;  // of a block; of a warp; tokens whose inputs are made ready together
constexpr int HELD = HEAD / 4;                    // rows of a lane
static_assert(HEAD % 16 == 0 && HEAD <= 256, "a lane holds groups of 4 rows");

// What a block needs of some tokens of its V head.
struct Inputs {
    float q[BATCH][HEAD], k[BATCH][HEAD], v[BATCH][WARPS * COLUMNS];  // q and k normalised, q divided by sqrt(HEAD)
    float both[BATCH], decay[BATCH], step[BATCH];                     // k·q, exp(g), beta

    // A warp makes token i's from its q, k and v and its decay's and step's exponents.
    __device__ void make(int i, const float* q_from, const float* k_from, const float* v_from, int n_columns, float eps, int lane) {
        float qq = 0, kk = 0, qk = 0;
        for (int d = lane; d < HEAD; d += 32) {
            const float x = q_from[d], y = k_from[d];
            qq += x * x, kk += y * y, qk += x * y;
        }
        const float q_scale = 1.0f / (fmaxf(sqrtf(warp_sum(qq)), eps) * sqrtf(HEAD)), k_scale = 1.0f / fmaxf(sqrtf(warp_sum(kk)), eps);
        for (int d = lane; d < HEAD; d += 32) q[i][d] = q_from[d] * q_scale, k[i][d] = k_from[d] * k_scale;
        if (lane < n_columns) v[i][lane] = v_from[lane];
        qk = warp_sum(qk);
        if (lane == 0) both[i] = qk * q_scale * k_scale;
    }

    // g = a * softplus(alpha + dt), beta = sigmoid(beta).
    __device__ void make_gates(int i, float alpha, float beta, float a, float dt) {
        const float x = alpha + dt;
        decay[i] = expf(a * (x > 20.0f ? x : log1pf(expf(x))));
        step[i] = sigmoid(beta);
    }
};

// out [n_tokens, n_v_head, d_v] from qkv [n_tokens, 2 * n_k_head * HEAD + n_v_head * d_v], which are q, k, v after the convolution;
// alpha, beta [n_tokens, n_v_head] raw; a, dt_bias [n_v_head]; state [n_v_head, HEAD, d_v] is read and written. V head h uses K head
// h % n_k_head. d_v is a multiple of 8. Grid (d_v / 32 rounded up, n_v_head), block 128. out must not be qkv.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
delta_rule(float* out, const float* qkv, const float* alpha, const float* beta, const float* a, const float* dt_bias, float* state,
           int n_tokens, int n_k_head, int n_v_head, int d_v, float eps) {
    __shared__ __align__(16) Inputs inputs;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), h = blockIdx.y;
    const int first_column = blockIdx.x * WARPS * COLUMNS, mine = warp * COLUMNS + lane % COLUMNS, group = lane / COLUMNS;
    const bool idle = first_column + warp * COLUMNS >= d_v;  // such a warp only helps with the inputs
    const int q_at = h % n_k_head * HEAD, k_at = q_at + n_k_head * HEAD, v_at = 2 * n_k_head * HEAD + h * d_v + first_column;
    const int channels = 2 * n_k_head * HEAD + n_v_head * d_v;
    float* S = state + (int64_t)h * HEAD * d_v + first_column + mine;
    float* o = out + h * d_v + first_column + mine;
    auto row = [=](int i) { return (i / 4 * 16 + group * 4 + i % 4) * d_v; };
    float s[HELD];
    if (!idle)
#pragma unroll
        for (int i = 0; i < HELD; i++) s[i] = S[row(i)];
    for (int first = 0; first < n_tokens; first += BATCH) {
        const int n = min(BATCH, n_tokens - first);
        __syncthreads();  // nobody reads the last tokens' inputs any more
        for (int i = warp; i < n; i += WARPS) {
            const float* x = qkv + (int64_t)(first + i) * channels;
            inputs.make(i, x + q_at, x + k_at, x + v_at, d_v - first_column, eps, lane);
        }
        if (threadIdx.x < n) {
            const int at = (first + threadIdx.x) * n_v_head + h;
            inputs.make_gates(threadIdx.x, alpha[at], beta[at], a[h], dt_bias[h]);
        }
        __syncthreads();
        if (idle) continue;
#pragma unroll 1
        for (int t = 0; t < n; t++) {
            const float *k = inputs.k[t] + 4 * group, *q = inputs.q[t] + 4 * group;
            float seen[4] = {}, asked[4] = {};  // Sᵀk and Sᵀq, as four sums each
#pragma unroll
            for (int i = 0; i < HELD; i += 4) {
                const float4 kk = *(const float4*)(k + 4 * i), qq = *(const float4*)(q + 4 * i);
                seen[0] += kk.x * s[i], seen[1] += kk.y * s[i + 1], seen[2] += kk.z * s[i + 2], seen[3] += kk.w * s[i + 3];
                asked[0] += qq.x * s[i], asked[1] += qq.y * s[i + 1], asked[2] += qq.z * s[i + 2], asked[3] += qq.w * s[i + 3];
            }
            float sk = (seen[0] + seen[1]) + (seen[2] + seen[3]), sq = (asked[0] + asked[1]) + (asked[2] + asked[3]);
#pragma unroll
            for (int lanes = COLUMNS; lanes < 32; lanes *= 2) {
                sk += __shfl_xor_sync(ALL_LANES, sk, lanes);
                sq += __shfl_xor_sync(ALL_LANES, sq, lanes);
            }
            const float decay = inputs.decay[t], delta = inputs.step[t] * (inputs.v[t][mine] - decay * sk);
            if (group == 0) o[(int64_t)(first + t) * n_v_head * d_v] = decay * sq + inputs.both[t] * delta;
#pragma unroll
            for (int i = 0; i < HELD; i += 4) {
                const float4 kk = *(const float4*)(k + 4 * i);
                s[i] = decay * s[i] + kk.x * delta, s[i + 1] = decay * s[i + 1] + kk.y * delta;
                s[i + 2] = decay * s[i + 2] + kk.z * delta, s[i + 3] = decay * s[i + 3] + kk.w * delta;
            }
        }
    }
    if (!idle)
#pragma unroll
        for (int i = 0; i < HELD; i++) S[row(i)] = s[i];
}
