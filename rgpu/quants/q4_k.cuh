// Q4_K: d, dmin float16, 12 bytes of eight 6-bit (scale, minimum) pairs, 128 bytes of nibbles. See q4_k.py.
//
// Weight n of run j = n // 32 is d·scale_j·q - dmin·min_j; bytes 32c … 32c + 31 of the nibbles hold run 2c low and 2c + 1 high.
struct Q4_K {
    static constexpr int block = 256, nbytes = 144, group = 32, zero = 0;
    static constexpr bool minima = true;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        const int c = 16 + 32 * (j / 2), shift = 4 * (j % 2);
        return make_int2(w.word(c, i, shift) & 0x0F0F0F0F, w.word(c, i + 4, shift) & 0x0F0F0F0F);
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return half2_to_float2(w.word(0, 0)).x * (float)six_bit_scale(w, g);
    }
    template <class W>
    static __device__ float minimum(W w, int g) {
        return half2_to_float2(w.word(0, 0)).y * (float)six_bit_minimum(w, g);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q4_K>(row, first, out); }
};
