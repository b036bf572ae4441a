// What the fibres tell the sanitizers. simt.cpp itself is compiled without instrumentation; with
// SIMT_TSAN or SIMT_ASAN it is linked to kernels that have it.
#pragma once

#include <cstddef>

#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
unsigned char __tsan_atomic8_fetch_add(volatile unsigned char* p, unsigned char v, int order);
unsigned short __tsan_atomic16_fetch_add(volatile unsigned short* p, unsigned short v, int order);
unsigned __tsan_atomic32_fetch_add(volatile unsigned* p, unsigned v, int order);
unsigned long __tsan_atomic64_fetch_add(volatile unsigned long* p, unsigned long v, int order);
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int order);
unsigned short __tsan_atomic16_load(const volatile unsigned short* p, int order);
unsigned __tsan_atomic32_load(const volatile unsigned* p, int order);
unsigned long __tsan_atomic64_load(const volatile unsigned long* p, int order);
}

namespace simt {
void observe();

// Inside, memory comes and goes unseen: to TSan malloc and free are writes, and what the fibres and
// the scheduler do for each other is not ordered.
struct Uninstrumented {
  Uninstrumented() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Uninstrumented() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
};
}  // namespace simt

extern "C" {
// What g++ calls before a volatile access (--param=tsan-distinguish-volatile=1). On the device such
// an access is a relaxed atomic one; adding 0 is a write that leaves the value.
#define SIMT_VOLATILE(bytes, bits, T)                        \
  void __tsan_volatile_read##bytes(T* p) {                   \
    simt::observe();                                         \
    __tsan_atomic##bits##_load(p, __ATOMIC_RELAXED);         \
  }                                                          \
  void __tsan_volatile_write##bytes(T* p) {                  \
    __tsan_atomic##bits##_fetch_add(p, 0, __ATOMIC_RELAXED); \
  }
SIMT_VOLATILE(1, 8, unsigned char)
SIMT_VOLATILE(2, 16, unsigned short)
SIMT_VOLATILE(4, 32, unsigned)
SIMT_VOLATILE(8, 64, unsigned long)
#undef SIMT_VOLATILE
}
#define TSAN(call) call
#else
#define TSAN(call) static_cast<void>(0)
namespace simt {
struct Uninstrumented {
  Uninstrumented() {}
};
}  // namespace simt
#endif

#if defined(SIMT_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}
#define ASAN(call) call
#else
#define ASAN(call) static_cast<void>(0)
#endif
