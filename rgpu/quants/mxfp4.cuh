// MXFP4: an E8M0 exponent, 16 bytes of E2M1 nibbles as Q4_0; value = 2^(e - 128)·T[q], T doubled E2M1. See mxfp4.py.
struct MXFP4 {
    static constexpr int block = 32, nbytes = 17, group = 32, zero = 0;
    static constexpr bool minima = false;

    // T: 0 1 2 3, 4 6 8 12, and the same negated (code 8 is plain zero).
    template <class W>
    static __device__ int2 words(W w, int j, int i) {
        return table_values(0x03020100, 0x0C080604, 0xFDFEFF00, 0xF4F8FAFC, w.word(1, i));
    }
    template <class W>
    static __device__ float scale(W w, int g) {
        const int e = w.byte(0);  // 2^-127 and 2^-128 are no normal numbers
        return __int_as_float(e < 2 ? 0x00200000 << e : (e - 1) << 23);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) { values_of_block<MXFP4>(row, first, out); }
};
