// The stand-in's processor: runs the blocks of a launch one after another, the threads of a block as fibers.
//
// A thread runs until it must wait for others (a barrier, a warp operation, a rest) or ends; then the next one that can run
// goes on. The order is drawn for each block, so that nobody relies on who came first. One launch runs at a time; one whose
// threads all wait or rest is left, and can be resumed when the world outside may have changed.

#include <string.h>
#include <sys/mman.h>

#include <utility>

#include "run.h"
#include "switch.h"

constexpr size_t MOST_SHARED = 256 << 10;  // bytes
constexpr uint16_t POISON = 0x7FF7;        // as in memory.py

Run* run;

extern "C" {
sim_self* sim_thread;
uint3 sim_block, sim_grid_size, sim_block_size;
}

static uint64_t random_number() {  // xorshift64*
    uint64_t& x = run->random;
    x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
    return x * 0x2545F4914F6CDD1DULL >> 32;
}

// ---- who runs ----

static char* new_stack() {
    char* low = (char*)mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (low == MAP_FAILED) fault(0, "no memory for the stacks of its threads");
    mprotect(low, PAGE, PROT_NONE);
    // Tops at the same distance from a page would share a few lines of the cache.
    char* top = low + PAGE + STACK - run->stacks.size() * 448 % PAGE;
    run->stacks.push_back(top);
    return top;
}

// What to switch to for a thread to go on, or to begin.
static inline void* stack_of(Thread* thread) {
    if (thread->sp) return thread->sp;
    if (run->free_stacks.empty()) run->free_stacks.push_back(new_stack());
    thread->stack = run->free_stacks.back();
    run->free_stacks.pop_back();
    return fresh(thread->stack);
}

static void make_ready(Warp& warp, unsigned lanes) {
    warp.ready |= lanes;
    if (lanes) run->ready_warps |= 1u << (&warp - run->warps);
}

// The first thread that is ready, of this warp if there is one, is the running one from now on; null if none is.
static inline Thread* next_thread() {
    Warp* warp = run->warp;
    if (!warp->ready) {
        if (!run->ready_warps) return nullptr;
        warp = run->warp = &run->warps[__builtin_ctz(run->ready_warps)];
    }
    int place = __builtin_ctz(warp->ready);
    run->bit = 1u << place;
    if (!(warp->ready &= warp->ready - 1)) run->ready_warps &= ~(1u << (warp - run->warps));
    sim_thread = &warp->threads[place];
    return self();
}

void leave(Status status) {
    static void* never;
    run->status = status;
    sim_switch(&never, run->outside);
    __builtin_unreachable();
}

// Nobody can run: either some rest, and the world outside may change what they look at, or it stays so for ever.
static Status stuck() {
    int n_meeting = 0, line = 0;
    for (const Warp& warp : run->warps) {
        if (warp.resting) return RESTING;
        n_meeting += __builtin_popcount(warp.meeting);
        if (warp.meeting) line = warp.meetings[__builtin_ctz(warp.meeting)].line;
    }
    if (run->arrived)
        fault(0, "deadlock: %d threads wait at __syncthreads (line %d), %d at a warp operation (line %d)", run->arrived,
              run->barrier_line, n_meeting, line);
    fault(0, "deadlock: %d threads wait at a warp operation (line %d) for lanes that are elsewhere", n_meeting, line);
}

// Let others run; come back when this thread is ready and it is its turn.
static inline void yield() {
    Thread *me = self(), *next = next_thread();
    if (!next) {
        run->status = stuck();
        sim_switch(&me->sp, run->outside);
    } else if (next != me) {
        sim_switch(&me->sp, stack_of(next));
    }
}

// ---- who waits for whom ----

static void open_barrier() {
    run->arrived = 0;
    for (Warp& warp : run->warps) make_ready(warp, warp.alive);
    run->warp = &run->warps[__builtin_ctz(run->ready_warps)];  // from the beginning, not from who came last
}

extern "C" void sim_barrier(int line) {
    if (run->arrived == 0) run->barrier_line = line;
    if (run->barrier_line != line)
        fault(0, "threads of a block are at different __syncthreads: lines %d and %d", run->barrier_line, line);
    if (++run->arrived == run->alive) open_barrier();
    yield();
}

// A set of lanes as a set of places, or the other way round.
static unsigned places(unsigned mask) {
    static const unsigned low[5] = {0x55555555, 0x33333333, 0x0F0F0F0F, 0x00FF00FF, 0x0000FFFF};
    if (mask == ~0u) return mask;
    for (int i = 0; i < 5; i++)
        if (run->lane_order >> i & 1) mask = (mask & low[i]) << (1 << i) | (mask >> (1 << i) & low[i]);
    return mask;
}

// If all living lanes of `mask` have come: do what they came for and let them go.
static void meet(Warp& warp, unsigned mask) {
    unsigned lanes = places(mask) & warp.alive;
    if (lanes & ~warp.meeting) return;
    const Meeting& first = warp.meetings[__builtin_ctz(lanes)];
    void* mine[LANES];
    for (unsigned left = lanes; left; left &= left - 1) {
        int place = __builtin_ctz(left);
        const Meeting& m = warp.meetings[place];
        if (m.mask != mask)
            fault(0, "lanes wait for each other with different masks, %08x and %08x (line %d)", m.mask, mask, m.line);
        if (m.line != first.line || m.combine != first.combine)
            fault(0, "lanes of a warp are at different warp operations: lines %d and %d", first.line, m.line);
        mine[place ^ run->lane_order] = m.mine;
    }
    if (first.combine) first.combine(mine, places(lanes));
    warp.meeting &= ~lanes;
    make_ready(warp, lanes);
}

extern "C" void sim_meet(unsigned mask, sim_combine combine, void* mine, int line) {
    if (!(mask >> self()->lane & 1)) fault(0, "a lane is not in the mask of its own warp operation (line %d)", line);
    Warp& warp = *run->warp;
    warp.meetings[__builtin_ctz(run->bit)] = {mask, line, combine, mine};
    warp.meeting |= run->bit;
    meet(warp, mask);
    yield();
}

extern "C" void sim_rest() {
    run->warp->resting |= run->bit;
    yield();
}

static void end_thread() {
    Warp& warp = *run->warp;
    warp.alive &= ~run->bit;
    if (--run->alive == 0) leave(DONE);
    if (run->arrived == run->alive) open_barrier();  // the others waited for this one only
    for (unsigned left = warp.meeting; left; left &= left - 1) meet(warp, warp.meetings[__builtin_ctz(left)].mask);
}

// The life of a stack: it runs a thread to its end, and then others that have not begun, for as long as it is their turn.
extern "C" void sim_fiber() {
    for (;;) {
        run->launch->invoke(run->launch->arguments);
        char* stack = self()->stack;
        end_thread();
        Thread* next = next_thread();
        if (!next) leave(stuck());
        if (next->sp) {
            static void* never;
            run->free_stacks.push_back(stack);
            sim_switch(&never, next->sp);
        }
        next->stack = stack;
    }
}

// ---- what else kernels call ----

extern "C" char* sim_dynamic_shared() { return run->shared_end - (run->launch->dynamic_bytes + 15) / 16 * 16; }

extern "C" void sim_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

extern "C" long long sim_clock() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static LateCopies& late() {
    uint3 i = sim_thread->index, size = sim_block_size;
    return run->late[i.x + size.x * (i.y + size.y * i.z)];
}

extern "C" void sim_copy_late(void* to, const void* from, int nbytes) {
    late().copies.push_back({to, from, nbytes, late().group});
}

extern "C" void sim_copy_commit() { late().group++; }

extern "C" void sim_copy_wait(int groups) {
    std::vector<LateCopies::Copy>& copies = late().copies;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < late().group - groups; n++) {
        memcpy(copies[n].to, copies[n].from, copies[n].nbytes);
        count(copies[n].from, copies[n].nbytes, run->launch->loaded);
    }
    copies.erase(copies.begin(), copies.begin() + n);
}

// ---- blocks and launches ----

static void poison(char* begin, size_t nbytes) {
    for (size_t i = (uintptr_t)begin % 2; i + 2 <= nbytes; i += 2) memcpy(begin + i, &POISON, 2);
}

static uint3 in_box(unsigned i, uint3 size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

static void begin_block(Launch* launch) {
    sim_block = in_box(run->blocks.back(), launch->grid);
    run->blocks.pop_back();
    run->alive = run->n_threads;
    run->ready_warps = 0;
    run->free_stacks = run->stacks;
    // Lane 0 is not the first of its warp, nor is lane 31: it may be the one that does what the others forget to wait for.
    run->lane_order = 1 + random_number() % (LANES - 2);
    run->warp_order = random_number() % WARPS;
    for (Warp& warp : run->warps) warp.alive = warp.ready = warp.meeting = warp.resting = 0;
    for (int i = 0; i < run->n_threads; i++) {
        Warp& warp = run->warps[i / LANES ^ run->warp_order];
        int lane = i % LANES, place = lane ^ run->lane_order;
        warp.alive |= 1u << place;
        warp.threads[place] = {{in_box(i, launch->block), lane}, nullptr, nullptr};
        run->late[i].copies.clear();
    }
    open_barrier();
    poison(launch->static_shared, launch->static_bytes);
    poison(sim_dynamic_shared(), launch->dynamic_bytes);
}

static std::vector<Run*> idle;  // with their stacks

static Run* begin(Launch* launch) {
    if (idle.empty()) {
        run = new Run();
        char* shared = (char*)mmap(nullptr, MOST_SHARED + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(shared + MOST_SHARED, PAGE, PROT_NONE);
        run->shared_end = shared + MOST_SHARED;
    } else {
        run = idle.back();
        idle.pop_back();
    }
    run->launch = launch;
    run->random = launch->seed * 2 + 1;
    run->n_threads = (int)(launch->block.x * launch->block.y * launch->block.z);
    run->blocks.resize(size_t(launch->grid.x) * launch->grid.y * launch->grid.z);
    for (size_t i = 0; i < run->blocks.size(); i++) run->blocks[i] = (unsigned)i;
    for (size_t i = run->blocks.size(); i > 1; i--) std::swap(run->blocks[i - 1], run->blocks[random_number() % i]);
    begin_block(launch);
    return run;
}

static void resume(Launch* launch) {
    run = launch->run;
    sim_block = launch->block_at;
    memcpy(launch->static_shared, run->left_static_shared.data(), launch->static_bytes);
    for (Warp& warp : run->warps) {
        make_ready(warp, warp.resting);
        warp.resting = 0;
    }
}

// Runs a launch to its end, to a fault, or until nobody could go on but some rest: then it is to be called again.
EXPORT int sim_run(Launch* launch) {
    if (launch->run) resume(launch);
    else launch->run = begin(launch);
    sim_grid_size = launch->grid;
    sim_block_size = launch->block;
    Guard guard(launch->patience);
    for (;;) {
        sim_switch(&run->outside, stack_of(next_thread()));
        if (run->status != DONE || run->blocks.empty()) break;
        begin_block(launch);
    }
    if (run->status == RESTING) {  // its module may be used meanwhile
        run->left_static_shared.assign(launch->static_shared, launch->static_shared + launch->static_bytes);
        launch->block_at = sim_block;
        launch->thread_at = sim_thread->index;
    } else {
        idle.push_back(run);
    }
    return launch->status = run->status;
}
