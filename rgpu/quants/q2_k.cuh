// Q2_K: sixteen bytes of (4-bit scale, 4-bit minimum), 64 bytes of 2-bit quants, d, dmin float16. See q2_k.py.
//
// Weight 128c + 32k + i is bits 2k of byte 32c + i; group j of 16 weights: d·scale_j·q - dmin·min_j.
struct Q2_K {
    static constexpr int block = 256, nbytes = 84, group = 16, zero = 0;
    static constexpr bool minima = true;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        const int c = 16 + 32 * (j / 4), shift = 2 * (j % 4);
        return make_int2(w.word(c, i, shift) & 0x03030303, w.word(c, i + 4, shift) & 0x03030303);
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(80) * (float)(w.byte(g) & 15);
    }
    template <class W>
    static __device__ float minimum(W w, int g) {
        return w.half(82) * (float)(w.byte(g) >> 4);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q2_K>(row, first, out); }
};
