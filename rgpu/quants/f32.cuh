// F32: plain float32. Norms, routers and small tensors stay in it; also a KV cache type, hence `pack`. See f32.py.
struct F32 {
    static constexpr int block = 1, nbytes = 4;

    static __device__ float value(const uint8_t* row, int n) { return ((const float*)row)[n]; }
    static __device__ void unpack(uint4 bytes, float (&out)[4]) {
        out[0] = __uint_as_float(bytes.x), out[1] = __uint_as_float(bytes.y);
        out[2] = __uint_as_float(bytes.z), out[3] = __uint_as_float(bytes.w);
    }
    static __device__ void values(const uint8_t* row, int first, float (&out)[8]) {
        const float4 a = *(const float4*)(row + 4 * first), b = *(const float4*)(row + 4 * first + 16);
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    }
    static __device__ void pack(uint8_t* data, int64_t i, float value) { ((float*)data)[i] = value; }
};
