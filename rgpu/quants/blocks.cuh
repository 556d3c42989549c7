// What CUDA kernels know of a type: one struct per type (quants/<type>.cuh), of static members only, given to templates.
//
//   block, nbytes        weights and bytes of a block; block = 1: no blocks
//   values(row, first, out)   8 weights from column `first` (a multiple of 8) of a row, as float; rows are multiples of 8 long
//   pack(data, i, value)      where a KV cache may use the type: a warp stores 32 elements, lane 0 one with i % 32 == 0
// Types of blocks also have the integer view that products use, of a block `w` seen through Block below:
//   group, zero, minima  weights that share a scale (16 or 32); what stands for 0; whether weight = scale·q - minimum, or scale·q
//   words(w, j, i)       words i (x) and i + 4 (y), i < 4, of the 32 weights of run j: four q + zero each, as int8
//   scale(w, g), minimum(w, g)   of group g
// Types without blocks have instead:
//   value(row, n)        weight n of a row
//   unpack(bytes, out)   16 bytes of a row as 16 / nbytes floats
//
// This text stands behind kernels/common.cuh and in front of the types.

// Where the blocks of a type begin: multiples of this many bytes, in matrices that begin at multiples of 16.
template <class Q>
constexpr int ALIGNMENT = Q::nbytes % 16 == 0 ? 16 : Q::nbytes & -Q::nbytes;

// How words of a block are read. EXACT: nothing behind the block is touched. WORDS: up to 4 bytes behind it are, because a word
// at any address is cut from two aligned ones, of which neighbouring words share one. RUNS: as WORDS, and i is a constant, so
// that loads of 16 or 8 bytes serve several words of a type that is aligned so.
enum Reading { EXACT, WORDS, RUNS };

// A block in memory.
template <class Q, Reading reading>
struct Block {
    const uint8_t* at;

    // Word i of those from byte `offset` on (a multiple of the alignment, if that is 4 or more), moved right by `shift` < 8; what
    // comes in from the left means nothing.
    __device__ __forceinline__ int word(int offset, int i, int shift = 0) const {
        const uint8_t* p = at + offset;
        if constexpr (reading == RUNS && ALIGNMENT<Q> == 16) {
            const uint4 four = ((const uint4*)p)[i / 4];
            return (int)(i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w) >> shift;
        } else if constexpr (reading == RUNS && ALIGNMENT<Q> == 8) {
            const uint2 two = ((const uint2*)p)[i / 2];
            return (int)(i % 2 == 0 ? two.x : two.y) >> shift;
        } else if constexpr (ALIGNMENT<Q> >= 4) {
            return ((const int*)p)[i] >> shift;
        } else if constexpr (reading == EXACT) {
            return (ALIGNMENT<Q> == 2 ? load_int_2(p + 4 * i) : load_int_1(p + 4 * i)) >> shift;
        } else {
            const int skew = (int)(uint64_t)p & 3;
            const uint32_t* words = (const uint32_t*)(p - skew) + i;
            return (int)__funnelshift_r(words[0], words[1], 8 * skew + shift);
        }
    }
    __device__ __forceinline__ int byte(int offset) const { return at[offset]; }
    __device__ __forceinline__ uint16_t bits(int offset) const { return *(const uint16_t*)(at + offset); }
    __device__ __forceinline__ float half(int offset) const { return half_to_float(bits(offset)); }
};

// `values` of a type of blocks, from its integer view.
template <class Q>
__device__ void values_of_block(const uint8_t* row, int first, float (&out)[8]) {
    const Block<Q, EXACT> w = {row + first / Q::block * Q::nbytes};
    const int n = first % Q::block, i = n % 32 / 4, g = n / Q::group;
    const float scale = Q::scale(w, g);
    float minimum = 0;
    if constexpr (Q::minima) minimum = Q::minimum(w, g);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int2 pair = Q::words(w, n / 32, i % 4 + k);
        const int word = i < 4 ? pair.x : pair.y;
#pragma unroll
        for (int j = 0; j < 4; j++) out[4 * k + j] = scale * (float)((int8_t)(word >> 8 * j) - Q::zero) - minimum;
    }
}

// The q of words. Where `zero` is not 0 all bytes are below 128: none carries into the next.
template <class Q>
__device__ __forceinline__ int2 centred(int2 words) {
    if constexpr (Q::zero == 0) {
        return words;
    } else {
        constexpr int more = (128 - Q::zero) * 0x01010101;
        return make_int2((words.x + more) ^ 0x80808080, (words.y + more) ^ 0x80808080);
    }
}

// The low nibbles of four bytes and their high nibbles.
__device__ __forceinline__ int2 nibbles(int bytes) { return make_int2(bytes & 0x0F0F0F0F, bytes >> 4 & 0x0F0F0F0F); }

// The same with the fifth bits of 32 weights (bit n: of weight n) for words i and i + 4.
__device__ __forceinline__ int2 five_bits(int bytes, int high, int i) {
    // The product holds four bits at 0, 7, 14 and 21; the mask keeps bit k of copy k, at 8k.
    constexpr int copies = 1 | 1 << 7 | 1 << 14 | 1 << 21, lowest = 0x01010101;
    const int low = (high >> 4 * i & 15) * copies & lowest, next = (high >> (4 * i + 16) & 15) * copies & lowest;
    const int2 q = nibbles(bytes);
    return make_int2(q.x | low << 4, q.y | next << 4);
}

// For the low nibbles of four bytes and for the high ones: entries of a table of 16 int8, given as words of 4.
__device__ __forceinline__ int2 table_values(uint32_t t0, uint32_t t1, uint32_t t2, uint32_t t3, int bytes) {
    // A byte_perm chooses from 8 bytes by 3 bits, so each half of the table is asked, and bit 3 chooses between the answers.
    const uint32_t upper = 0x32103210u | ((uint32_t)bytes & 0x88888888u) >> 1;
    const uint32_t index = (uint32_t)bytes & 0x77777777u;
    const uint32_t first = __byte_perm(__byte_perm(t0, t1, index), __byte_perm(t2, t3, index), upper);
    const uint32_t second = __byte_perm(__byte_perm(t0, t1, index >> 16), __byte_perm(t2, t3, index >> 16), upper >> 16);
    // Both hold entries of low and high nibbles in turn.
    return make_int2((int)__byte_perm(first, second, 0x6420), (int)__byte_perm(first, second, 0x7531));
}

// Scale g of a block of Q4_K or Q5_K, or its minimum: 6 bits each of the 12 bytes from byte 4.
template <class W>
__device__ __forceinline__ int six_bit_scale(W w, int g) {
    const int shift = 8 * (g % 4), high = w.word(0, 1) >> shift, low = w.word(0, 3) >> shift;
    return g < 4 ? high & 63 : (low & 15) | (high >> 2 & 48);
}

template <class W>
__device__ __forceinline__ int six_bit_minimum(W w, int g) {
    const int shift = 8 * (g % 4), high = w.word(0, 2) >> shift, low = w.word(0, 3) >> shift;
    return g < 4 ? high & 63 : (low >> 4 & 15) | (high >> 2 & 48);
}
