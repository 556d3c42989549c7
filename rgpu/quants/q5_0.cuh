// Q5_0: d float16, the 32 fifth bits, 16 bytes of nibbles as Q4_0; value = d·(q - 16). See q5_0.py.
struct Q5_0 {
    static constexpr int block = 32, nbytes = 22, group = 32, zero = 16;
    static constexpr bool minima = false;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return five_bits(w.word(6, i), w.word(2, 0), i);
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(0);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q5_0>(row, first, out); }
};
