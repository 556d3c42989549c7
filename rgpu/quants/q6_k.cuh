// Q6_K: 128 bytes of low nibbles, 64 of high pairs of bits, sixteen int8 scales, d float16 last. See q6_k.py.
//
// In each half of 128 weights, run k of 32: nibble k // 2 of low byte 32(k % 2) + i, bits 2k of high byte i.
// Group j of 16 weights: d·scale_j·(q - 32).
struct Q6_K {
    static constexpr int block = 256, nbytes = 210, group = 16, zero = 32;
    static constexpr bool minima = false;

    template <class W>
    static __device__ int quants(W w, int j, int i) {
        const int low = w.word(64 * (j / 4) + 32 * (j % 2), i, 4 * (j % 4 / 2));
        const int high = w.word(128 + 32 * (j / 4), i, 2 * (j % 4));
        return (low & 0x0F0F0F0F) | (high & 0x03030303) << 4;
    }
    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return make_int2(quants(w, j, i), quants(w, j, i + 4));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(208) * (float)(int8_t)w.byte(192 + g);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q6_K>(row, first, out); }
};
