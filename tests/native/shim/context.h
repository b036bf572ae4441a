// Switching between stacks: a few instructions on x86-64, ucontext (a system call each) elsewhere
// or with SIMT_UCONTEXT.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace simt {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 64 * 1024;  // a multiple of every page size

// A stack over a page that cannot be touched: what overflows it ends the process.
inline char* new_stack() {
  void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(p) + kGuardBytes;
}

#if defined(__x86_64__) && defined(__ELF__) && !defined(SIMT_UCONTEXT)

// Saves the callee-saved registers on the stack and swaps stack pointers.
asm(R"(
.pushsection .text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
.popsection
)");
extern "C" void simt_switch(void** save, void* load);

struct Context {
  void* sp = nullptr;

  // `entry` never returns. `top` is 16-byte aligned.
  void init(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(stack + bytes);
    *--top = 0;  // the return address: aligns as a call would
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    sp = top;
  }
  static void swap(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
};

#else

struct Context {
  ucontext_t uc;

  void init(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&uc);
    uc.uc_stack.ss_sp = stack;
    uc.uc_stack.ss_size = bytes;
    uc.uc_link = nullptr;
    makecontext(&uc, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.uc, &to.uc); }
};

#endif

}  // namespace simt
