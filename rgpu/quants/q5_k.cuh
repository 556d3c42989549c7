// Q5_K: d, dmin float16, 12 bytes of scales and minima as Q4_K, 32 bytes of fifth bits, 128 of nibbles. See q5_k.py.
//
// As Q4_K, and bit j of high byte i is the fifth bit of weight i of run j: d·scale_j·q - dmin·min_j.
struct Q5_K {
    static constexpr int block = 256, nbytes = 176, group = 32, zero = 0;
    static constexpr bool minima = true;

    template <class W>
    static __device__ int quants(W w, int j, int i) {
        const int low = w.word(48 + 32 * (j / 2), i, 4 * (j % 2)), high = w.word(16, i, j);
        return (low & 0x0F0F0F0F) | (high & 0x01010101) << 4;
    }
    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return make_int2(quants(w, j, i), quants(w, j, i + 4));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return half2_to_float2(w.word(0, 0)).x * (float)six_bit_scale(w, g);
    }
    template <class W>
    static __device__ float minimum(W w, int g) {
        return half2_to_float2(w.word(0, 0)).y * (float)six_bit_minimum(w, g);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q5_K>(row, first, out); }
};
