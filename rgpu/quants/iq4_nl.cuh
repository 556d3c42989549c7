// IQ4_NL: d float16, 16 bytes of nibbles as Q4_0 that choose from a table of unequal steps; value = d·T[q]. See iq4_nl.py.
struct IQ4_NL {
    static constexpr int block = 32, nbytes = 18, group = 32, zero = 0;
    static constexpr bool minima = false;

    // T: -127 -104 -83 -65, -49 -35 -22 -10, 1 13 25 38, 53 69 89 113.
    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return table_values(0xBFAD9881, 0xF6EADDCF, 0x26190D01, 0x71594535, w.word(2, i));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        return w.half(0);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<IQ4_NL>(row, first, out); }
};
