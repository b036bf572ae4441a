// Which instruction set the CPU kernels run on: chosen once, from what the processor reports.
#pragma once

namespace inferlab::cpu {

// In order: each runs the code of those before it. The last two are kAvx512's code, with products
// of bf16 pairs and AMX tiles for bf16 inside some kernels.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Isa active_isa();
const char* isa_name(Isa isa);

// For tests: run on a lower instruction set ("avx2", "avx512", "avx512_bf16", "amx", "generic";
// "auto" undoes it). False if this build or this processor does not have it.
bool force_isa(const char* name);

}  // namespace inferlab::cpu

// INFERLAB_DECLARE_KERNEL(Status, sample, const SampleParams&) declares the copies of a kernel, one
// in each instruction set's namespace; INFERLAB_DISPATCH(sample, params) calls the active one.
#if defined(__x86_64__) || defined(_M_X64)
#define INFERLAB_X86 1
#define INFERLAB_DECLARE_KERNEL(ret, name, ...) \
  namespace avx2 {                              \
  ret name(__VA_ARGS__);                        \
  }                                             \
  namespace avx512 {                            \
  ret name(__VA_ARGS__);                        \
  }
#define INFERLAB_DISPATCH(name, ...)                                                          \
  (::inferlab::cpu::active_isa() >= ::inferlab::cpu::Isa::kAvx512 ? avx512::name(__VA_ARGS__) \
                                                                  : avx2::name(__VA_ARGS__))
#else
#define INFERLAB_DECLARE_KERNEL(ret, name, ...) \
  namespace generic {                           \
  ret name(__VA_ARGS__);                        \
  }
#define INFERLAB_DISPATCH(name, ...) generic::name(__VA_ARGS__)
#endif
