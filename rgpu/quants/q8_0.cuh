// Q8_0: d float16, 32 int8; value = d·q. Also a KV cache type, hence `pack`. See q8_0.py.
struct Q8_0 {
    static constexpr int block = 32, nbytes = 34, group = 32, zero = 0;
    static constexpr bool minima = false;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return make_int2(w.word(2, i), w.word(2, i + 4));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(0);
    }

    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) {
        const uint8_t* w = row + first / 32 * 34;
        const float d = half_to_float(*(const uint16_t*)w);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int word = load_int_2(w + 2 + first % 32 + 4 * k);
#pragma unroll
            for (int j = 0; j < 4; j++) out[4 * k + j] = d * (float)(int8_t)(word >> 8 * j);
        }
    }

    // Halves are rounded away from zero, as ggml does (C's roundf), not to even.
    static __device__ void pack(uint8_t* data, int64_t i, float value) {
        const float d = warp_max(fabsf(value)) / 127.0f;
        // Below 2^-128 1/d overflows; d is 0 in float16 long before, so the quants don't matter.
        const float inverse = d > 2.938735877e-39f ? 1.0f / d : 0.0f;
        uint8_t* w = data + i / 32 * 34;
        w[2 + i % 32] = (uint8_t)(int)roundf(value * inverse);
        if (i % 32 == 0) *(uint16_t*)w = float_to_half(d);
    }
};
