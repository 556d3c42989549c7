// Q5_1: d, m float16, the 32 fifth bits, 16 bytes of nibbles as Q4_1; value = d·q + m. See q5_1.py.
struct Q5_1 {
    static constexpr int block = 32, nbytes = 24, group = 32, zero = 0;
    static constexpr bool minima = true;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return five_bits(w.word(8, i), w.word(0, 1), i);
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(0);
    }
    template <class W>
    static __device__ float minimum(W w, int g) {
        return -w.half(2);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<Q5_1>(row, first, out); }
};
