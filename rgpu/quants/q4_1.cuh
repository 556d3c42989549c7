// Q4_1: d, m float16, 16 bytes of nibbles (first half low, second half high); value = d·q + m. See q4_1.py.
struct Q4_1 {
    static constexpr int block = 32, nbytes = 20, group = 32, zero = 0;
    static constexpr bool minima = true;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return nibbles(w.word(4, i));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(0);
    }
    template <class W>
    static __device__ float minimum(W w, int g) {
        return -w.half(2);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q4_1>(row, first, out); }
};
