// BF16: the upper half of a float32. See bf16.py.
struct BF16 {
    static constexpr int block = 1, nbytes = 2;

    static __device__ float value(const uint8_t* row, int n) { return bfloat16_to_float(((const uint16_t*)row)[n]); }
    static __device__ void unpack(uint4 bytes, float (&out)[8]) {
        const uint32_t words[] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000);
        }
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) {
        unpack(load_16(row + 2 * first), out);
    }
};
