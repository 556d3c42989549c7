// Q4_0: d float16, 16 bytes of nibbles (first half low, second half high); value = d·(q - 8). See q4_0.py.
struct Q4_0 {
    static constexpr int block = 32, nbytes = 18, group = 32, zero = 8;
    static constexpr bool minima = false;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return nibbles(w.word(2, i));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(0);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q4_0>(row, first, out); }
};
