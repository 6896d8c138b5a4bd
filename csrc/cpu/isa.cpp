#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastgen {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::kAvx512;
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
  for (int i = 0; i < 3; ++i) {
    if (std::string(value) == kNames[i]) return checked(static_cast<Isa>(i));
  }
  throw std::runtime_error(std::string("FASTGEN_CPU_ISA: expected portable, avx2 or avx512, got '") + value + "'");
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
  return i < 0 || i > 2 ? "unknown" : kNames[i];
}

}  // namespace fastgen
