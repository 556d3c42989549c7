// Q3_K: 32 bytes of high bits, 64 bytes of 2-bit quants as Q2_K, sixteen 6-bit scales in 12 bytes, d float16. See q3_k.py.
//
// 4 is subtracted where bit n // 32 of high byte n % 32 is 0. Group j of 16 weights: d·(scale_j - 32)·q.
struct Q3_K {
    static constexpr int block = 256, nbytes = 110, group = 16, zero = 4;
    static constexpr bool minima = false;

    template <class W>
    static __device__ int quants(W w, int j, int i) {
        const int low = w.word(32 + 32 * (j / 4), i, 2 * (j % 4)), high = w.word(0, i, j);
        return (low & 0x03030303) | (high & 0x01010101) << 2;
    }
    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return make_int2(quants(w, j, i), quants(w, j, i + 4));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        const int low = w.byte(96 + g % 8) >> 4 * (g / 8) & 15, high = w.byte(104 + g % 4) >> 2 * (g / 4) & 3;
        return w.half(108) * (float)((low | high << 4) - 32);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q3_K>(row, first, out); }
};
