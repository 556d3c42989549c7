// The largest of a row of logits and their tokens, so that a step copies a few numbers to the host instead of the vocabulary.
//
// Every block sorts SIZE candidates and passes the k best on; launches follow each other until one block is left: 248,320 logits
// and k = 64 take 122, 4 and 1 blocks. The row is read once, 4 bytes a logit, which takes less time than the launches.
// A logit and its token are one integer that orders like the logit, then by falling token: so the order is total and the answer
// the same on every run. -0 is 0; NaN is the largest of all, so that a broken row is seen.

constexpr int SIZE = 2048, THREADS = 512;

__device__ inline uint64_t candidate(float logit, int token) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);
    const uint32_t place = isnan(logit) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)place << 32 | (uint32_t)~token;
}

// The k best of n candidates, or where `from` is 0 of n logits, per row; rows are blockIdx.y. Several blocks a row leave theirs in
// best [rows, blocks, k]; a single one writes ids and values [rows, k], largest first; fewer than k candidates leave ids of -1.
// Grid (n / SIZE rounded up, rows), block THREADS; `best` is not `from`; k <= SIZE / 2.
extern "C" __global__ void __launch_bounds__(THREADS)
top_k(int* ids, float* values, uint64_t* best, const uint64_t* from, const float* logits, int n_vocab, int n, int k) {
    __shared__ uint64_t sorted[SIZE];
    const int first = blockIdx.x * SIZE, row = blockIdx.y;
    logits += (int64_t)row * n_vocab;
    for (int i = threadIdx.x; i < SIZE; i += THREADS) {
        const int at = first + i;
        sorted[i] = at >= n ? 0 : from ? from[(int64_t)row * n + at] : candidate(logits[at], at);
    }
    // Bitonic sort, largest first: runs of `run` are merged, comparing over falling distances.
    for (int run = 2; run <= SIZE; run *= 2)
        for (int distance = run / 2; distance; distance /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < SIZE / 2; i += THREADS) {
                const int low = i / distance * distance * 2 + i % distance, high = low + distance;
                const uint64_t a = sorted[low], b = sorted[high];
                if ((a < b) == ((low & run) == 0)) sorted[low] = b, sorted[high] = a;
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < k; i += THREADS) {
        if (gridDim.x > 1) {
            best[((int64_t)row * gridDim.x + blockIdx.x) * k + i] = sorted[i];
        } else {
            const int token = sorted[i] ? (int)~(uint32_t)sorted[i] : -1;
            ids[row * k + i] = token;
            values[row * k + i] = token >= 0 ? logits[token] : 0;
        }
    }
}
