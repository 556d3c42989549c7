// Switching from one stack to another, without the system call that swapcontext makes: two nanoseconds on x86-64.
#pragma once

#include "run.h"

// Saves the registers that a call preserves on the running stack and its address in *save; goes on with what was saved at `to`.
// It jumps back instead of returning: a return would be predicted to go where this stack came from, and cost 10 ns more.
extern "C" void sim_switch(void** save, void* to);
extern "C" void sim_fiber();  // where a stack begins; it never returns

#if defined(__x86_64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, @function
sim_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    pop %rcx
    jmp *%rcx
.size sim_switch, . - sim_switch
)");

// What to switch to for a stack to begin.
static void* fresh(char* top) {
    void** sp = (void**)top - 2;  // so that sim_fiber finds the stack as after a call
    *sp = (void*)sim_fiber;
    return sp - 6;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, %function
sim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x16, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    br x16
.size sim_switch, . - sim_switch
)");

static void* fresh(char* top) {
    void** sp = (void**)(top - 160);
    sp[11] = (void*)sim_fiber;  // x30
    return sp;
}
#else
#include <ucontext.h>

extern "C" void sim_switch(void** save, void* to) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, (ucontext_t*)to);
}

static void* fresh(char* top) {
    ucontext_t* context = (ucontext_t*)(top - STACK + PAGE);  // at the far end of its own stack
    getcontext(context);
    context->uc_stack.ss_sp = context + 1;
    context->uc_stack.ss_size = (size_t)(top - (char*)(context + 1));
    makecontext(context, sim_fiber, 0);
    return context;
}
#endif
