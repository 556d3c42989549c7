// A launch while it runs: shared by processor.cpp, which moves it on, and faults.cpp, which ends it.
#pragma once

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <vector>

#include "abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int MOST_THREADS = 1024, LANES = 32, WARPS = MOST_THREADS / LANES;
constexpr size_t PAGE = 4096, STACK = 64 << 10;  // bytes; a stack is what CUDA calls a thread's local memory

enum Status { DONE, RESTING, FAULT };

struct Run;

struct Launch {  // device.py fills in the first part and reads the second
    void (*invoke)(const char* arguments);
    const char* arguments;
    char* static_shared;  // the module's
    int64_t static_bytes, dynamic_bytes;
    uint3 grid, block;
    uint64_t seed;
    double patience;                // seconds of work after which a kernel that neither ends nor rests is given up
    uint64_t memory, memory_bytes;  // the device's addresses

    Run* run;  // null before the start
    int status;
    uint64_t loaded, stored;  // bytes of device memory, if the kernel was compiled to count them
    uint64_t address;         // that a fault is about, or 0
    uint3 block_at, thread_at;
    char what[256];
};

struct Thread : sim_self {
    void* sp;     // where sim_switch left it; null before it starts
    char* stack;  // the top of the one it has
};

struct Meeting {  // what a lane brings to a warp operation
    unsigned mask;
    int line;
    sim_combine combine;
    void* mine;
};

struct Warp {
    unsigned alive, ready, meeting, resting;  // sets of places: not ended, could run, in sim_meet, in sim_rest
    Thread threads[LANES];
    Meeting meetings[LANES];
};

struct LateCopies {  // of a thread
    struct Copy {
        void* to;
        const void* from;
        int nbytes, group;
    };
    std::vector<Copy> copies;
    int group = 0;  // the one that is being gathered
};

// Threads run in the order of their places: lane l of warp w has place l ^ lane_order in the warp at place w ^ warp_order, both
// drawn for each block. Sets of lanes are bits by place; the masks that kernels name are bits by lane.
struct Run {
    Launch* launch;
    std::vector<unsigned> blocks;  // those to do, the next one last
    uint64_t random;
    unsigned lane_order, warp_order, ready_warps;
    int n_threads, alive, arrived, barrier_line;
    Status status;
    Warp* warp;     // the running thread's
    unsigned bit;   // … its place in it
    void* outside;  // where sim_run waits for this to end or to rest
    Warp warps[WARPS];
    LateCopies late[MOST_THREADS];
    std::vector<char*> stacks, free_stacks;
    char* shared_end;                      // of the dynamic shared memory
    std::vector<char> left_static_shared;  // while it rests
};

extern Run* run;  // the one that runs

static inline Thread* self() { return (Thread*)sim_thread; }

// Adds to what the launch has loaded or stored, if it is device memory.
static inline void count(const void* address, int64_t nbytes, uint64_t& total) {
    if ((uint64_t)address - run->launch->memory < run->launch->memory_bytes) total += nbytes;
}

// Ends the launch; `address` is described by device.py unless it is 0.
[[noreturn]] void fault(uint64_t address, const char* format, ...);

// The running thread leaves for good.
[[noreturn]] void leave(Status status);

// While it lives, faults of this thread come to us, and its time is limited.
class Guard {
public:
    explicit Guard(double patience);
    ~Guard();

private:
    stack_t stack_before;
    timer_t timer;
};
