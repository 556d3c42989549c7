// F16: IEEE half precision. The default KV cache type, hence `pack`. See f16.py.
struct F16 {
    static constexpr int block = 1, nbytes = 2;

    static __device__ float value(const uint8_t* row, int n) { return half_to_float(((const uint16_t*)row)[n]); }
    static __device__ void unpack(uint4 bytes, float (&out)[8]) {
        const uint32_t words[] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = half2_to_float2(words[i]);
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) {
        unpack(load_16(row + 2 * first), out);
    }
    static __device__ void pack(uint8_t* data, int64_t i, float value) { ((uint16_t*)data)[i] = float_to_half(value); }
};
