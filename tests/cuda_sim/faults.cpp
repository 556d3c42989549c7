// What ends a launch early: signals, what g++'s sanitizers find, an endless loop. The process lives on.

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "run.h"

void fault(uint64_t address, const char* format, ...) {
    Launch* launch = run->launch;
    va_list list;
    va_start(list, format);
    vsnprintf(launch->what, sizeof launch->what, format, list);
    va_end(list);
    launch->address = address;
    launch->block_at = sim_block;
    launch->thread_at = sim_thread->index;
    leave(FAULT);  // from a signal's stack too: nothing there is needed again
}

extern "C" void sim_fault(const char* what, int line) { fault(0, "%s (line %d)", what, line); }

// ---- g++ -fsanitize=alignment,bounds: a GPU can't load 4 bytes from an odd address either ----

struct Place {
    const char* file;
    unsigned line, column;
};

struct Type {
    uint16_t kind, info;
    char name[];
};

struct Misaligned {
    Place at;
    Type* type;
    unsigned char log_alignment, access;
};

struct OutOfBounds {
    Place at;
    Type *array, *index;
};

EXPORT void __ubsan_handle_type_mismatch_v1_abort(Misaligned* m, uintptr_t address) {
    fault(address, "misaligned access to %s, line %u: it needs %d bytes", m->type->name, m->at.line, 1 << m->log_alignment);
}

EXPORT void __ubsan_handle_out_of_bounds_abort(OutOfBounds* o, uintptr_t index) {
    fault(0, "index %lld of %s, line %u", (long long)index, o->array->name, o->at.line);
}

// ---- g++ -fsanitize=thread: a call for each access, made to count bytes ----

#define COUNT(n)                                                                        \
    EXPORT void __tsan_read##n(void* p) { count(p, n, run->launch->loaded); }           \
    EXPORT void __tsan_write##n(void* p) { count(p, n, run->launch->stored); }          \
    EXPORT void __tsan_unaligned_read##n(void* p) { count(p, n, run->launch->loaded); } \
    EXPORT void __tsan_unaligned_write##n(void* p) { count(p, n, run->launch->stored); }
COUNT(1)
COUNT(2)
COUNT(4)
COUNT(8)
COUNT(16)
EXPORT void __tsan_read_range(void* p, long nbytes) { count(p, nbytes, run->launch->loaded); }
EXPORT void __tsan_write_range(void* p, long nbytes) { count(p, nbytes, run->launch->stored); }
EXPORT void __tsan_init() {}

// ---- signals ----

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static const int N_SIGNALS = sizeof SIGNALS / sizeof *SIGNALS;
static struct sigaction before[N_SIGNALS];
static pthread_t runner;
static volatile bool running;

static bool ours() { return running && pthread_equal(pthread_self(), runner); }

static void on_signal(int signal, siginfo_t* info, void*) {
    if (!ours()) {  // another thread's, or Python's own: it comes again, to whom it came before
        for (int i = 0; i < N_SIGNALS; i++)
            if (SIGNALS[i] == signal) sigaction(signal, &before[i], nullptr);
        return;
    }
    if (signal == SIGFPE) fault(0, "integer division by zero");
    if (signal == SIGILL) fault(0, "code that can't be reached");
    char *address = (char*)info->si_addr, *stack = self()->stack;
    if (address < stack - STACK + PAGE && address >= stack - STACK - 2 * PAGE)
        fault(0, "the thread needs more than %zu bytes of local memory", STACK - PAGE);
    fault((uint64_t)address, "access to memory nobody owns");
}

static void on_timer(int, siginfo_t*, void*) {
    if (ours()) fault(0, "did not end within %g s: an endless loop, or one that polls without rest()", run->launch->patience);
}

Guard::Guard(double patience) {
    static char stack[64 << 10];  // one runs at a time
    stack_t ours = {};
    ours.ss_sp = stack;
    ours.ss_size = sizeof stack;
    sigaltstack(&ours, &stack_before);
    struct sigaction action = {};
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // handlers do not return
    action.sa_sigaction = on_signal;
    for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &action, &before[i]);
    const int timeout = SIGRTMAX - 3;
    action.sa_sigaction = on_timer;
    sigaction(timeout, &action, nullptr);  // for good: the last one may come late
    runner = pthread_self();
    running = true;
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = timeout;
    event._sigev_un._tid = (int)syscall(SYS_gettid);
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);  // a busy machine is no fault
    itimerspec once = {};
    once.it_value.tv_sec = (time_t)patience;
    once.it_value.tv_nsec = (long)((patience - (double)(time_t)patience) * 1e9);
    timer_settime(timer, 0, &once, nullptr);
}

Guard::~Guard() {
    running = false;
    timer_delete(timer);
    for (int i = 0; i < N_SIGNALS; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
}
