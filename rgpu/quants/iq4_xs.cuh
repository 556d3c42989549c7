// IQ4_XS: d float16, eight 6-bit scales (high pairs in a uint16, low nibbles in 4 bytes), 128 bytes of nibbles. See iq4_xs.py.
//
// Run j of 32 weights is 16 of those bytes, nibbles as in IQ4_NL; value = d·(scale_j - 32)·T[q].
struct IQ4_XS {
    static constexpr int block = 256, nbytes = 136, group = 32, zero = 0;
    static constexpr bool minima = false;

    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return table_values(0xBFAD9881, 0xF6EADDCF, 0x26190D01, 0x71594535, w.word(8 + 16 * j, i));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        const int low = w.word(0, 1) >> 4 * g & 15, high = w.bits(2) >> 2 * g & 3;
        return w.half(0) * (float)((low | high << 4) - 32);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<IQ4_XS>(row, first, out); }
};
