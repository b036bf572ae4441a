#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(INFERLAB_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace inferlab::cpu {
namespace {

#if defined(INFERLAB_X86)
// bf16 tiles, and the system's leave to use them: their 8 KB of state is granted on request.
bool amx() {
#if defined(__linux__)
  constexpr unsigned kTileBits = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileBits) != kTileBits) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(INFERLAB_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (amx()) return Isa::kAmx;
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  return Isa::kAvx2;
#else
  return Isa::kGeneric;
#endif
}

std::atomic<int> g_forced{-1};

}  // namespace

Isa active_isa() {
  static const Isa best = detect();
  const int forced = g_forced.load(std::memory_order_relaxed);
  return forced < 0 ? best : static_cast<Isa>(forced);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    default:
      return "generic";
  }
}

bool force_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    g_forced.store(-1);
    return true;
  }
  const Isa best = detect();
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    if (std::strcmp(name, isa_name(isa)) != 0) continue;
    const bool built = (isa == Isa::kGeneric) == (best == Isa::kGeneric);
    if (!built || static_cast<int>(isa) > static_cast<int>(best)) return false;
#if defined(INFERLAB_X86)
    // A machine may have tiles and lack these.
    if (isa == Isa::kAvx512Bf16 && !__builtin_cpu_supports("avx512bf16")) return false;
#endif
    g_forced.store(static_cast<int>(isa));
    return true;
  }
  return false;
}

}  // namespace inferlab::cpu
