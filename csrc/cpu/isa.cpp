#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastgen {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};
constexpr int kCount = 4;

#if defined(__x86_64__)
// By hand: not every compiler's __builtin_cpu_supports knows the name.
bool has_bf16() {
  if (FASTGEN_BF16 == 0) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1u) != 0;
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512) return has_bf16() ? Isa::kAvx512Bf16 : Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa checked(Isa wanted) {
  if (static_cast<int>(wanted) < 0 || static_cast<int>(wanted) > static_cast<int>(best_isa())) {
    throw std::runtime_error(std::string("FASTGEN_CPU_ISA: this machine has no '") + isa_name(wanted) +
                             "'; its best is '" + isa_name(best_isa()) + "'");
  }
  return wanted;
}

Isa from_environment() {
  const char* value = std::getenv("FASTGEN_CPU_ISA");
  if (value == nullptr || *value == '\0') return best_isa();
  for (int i = 0; i < kCount; ++i) {
    if (std::string(value) == kNames[i]) return checked(static_cast<Isa>(i));
  }
  throw std::runtime_error(std::string("FASTGEN_CPU_ISA: expected portable, avx2, avx512 or avx512bf16, got '") +
                           value + "'");
}

std::atomic<int> g_isa{-1};

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(from_environment());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void force_isa(Isa isa) { g_isa.store(static_cast<int>(checked(isa)), std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  const int i = static_cast<int>(isa);
  return i < 0 || i >= kCount ? "unknown" : kNames[i];
}

}  // namespace fastgen
