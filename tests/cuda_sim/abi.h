// What a compiled kernel and the processor (processor.cpp) know of each other. device.py reads sim_kernel too.
#pragma once

struct uint3 {
    unsigned x, y, z;
};

struct sim_self {
    uint3 index;  // threadIdx
    int lane;
};

// Does what the lanes of a warp have met for: mine[lane] is what each lane in the set `present` brought.
typedef void (*sim_combine)(void* const* mine, unsigned present);

struct sim_parameter {
    int kind;  // 'p' pointer, 'i' signed, 'u' unsigned, 'f' floating, '?' anything else
    int nbytes;
};

struct sim_kernel {
    void (*invoke)(const char* arguments);  // 8 bytes each
    const sim_parameter* parameters;
    int n_parameters;
    int most_threads;  // in a block
};

#pragma GCC visibility push(default)
extern "C" {
extern sim_self* sim_thread;  // the running one
extern uint3 sim_block, sim_grid_size, sim_block_size;
char* sim_dynamic_shared();
void sim_barrier(int line);
void sim_meet(unsigned mask, sim_combine combine, void* mine, int line);
void sim_rest();
void sim_fence();
void sim_copy_late(void* to, const void* from, int nbytes);  // done at the latest when waited for
void sim_copy_commit();
void sim_copy_wait(int groups);
long long sim_clock();
[[noreturn]] void sim_fault(const char* what, int line);
}
#pragma GCC visibility pop
