// How the device and a thread of the host tell each other things in the middle of a step: numbers in a box, and a count that says
// they are new. Boxes and answers are int32 in mapped host memory; a kernel costs one or two trips over the bus, a microsecond each.

// box[2:] = ids, box[1] = their number, last box[0] += 1. With a table (int32 [n_expert], else 0) only the ids that have no slot
// there (-1), in their order, and nothing at all if there are none. Grid 1, block 32.
extern "C" __global__ void post(int* box, const int* ids, int n, const int* table) {
    const int lane = threadIdx.x;
    int count = 0;
    for (int first = 0; first < n; first += 32) {
        const int i = first + lane, id = i < n ? ids[i] : 0;
        const bool chosen = i < n && (!table || table[id] < 0);
        const unsigned votes = __ballot_sync(ALL_LANES, chosen);
        if (chosen) box[2 + count + __popc(votes & ((1u << lane) - 1))] = id;
        count += __popc(votes);
    }
    if (table && count == 0) return;
    if (lane == 0) box[1] = count;
    __syncthreads();
    if (lane == 0) post_flag(box, *(const volatile int*)box + 1);
}

// Go on when answer[0] has reached box[0]: who counts there has done what the box asks for. Grid 1, block 1.
extern "C" __global__ void wait(const int* box, const int* answer) { wait_flag(answer, *(const volatile int*)box); }
