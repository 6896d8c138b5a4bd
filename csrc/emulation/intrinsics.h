// Device functions on the host: bits, integers, arithmetic with a rounding mode, fast-math functions by libm,
// cached loads and stores, and atomics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

namespace fastgen::emulation {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace fastgen::emulation

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) { return fastgen::emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return fastgen::emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return fastgen::emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return fastgen::emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return fastgen::emulation::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return fastgen::emulation::bit_cast<double>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) >> (shift & 31));
}
// Byte i of the result is byte (selector >> 4 i) & 7 of b:a, or its sign spread out where bit 3 is set.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (s & 7)) & 255;
    if ((s & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::lrint(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::llrint(x)); }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanf(float x) { return std::tan(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline void __sincosf(float x, float* sine, float* cosine) {
  *sine = std::sin(x);
  *cosine = std::cos(x);
}

#define FASTGEN_CACHED_LOAD(name)                                                                                 \
  template <class T>                                                                                              \
  T name(const T* from) {                                                                                         \
    return *from;                                                                                                 \
  }
FASTGEN_CACHED_LOAD(__ldg)
FASTGEN_CACHED_LOAD(__ldca)
FASTGEN_CACHED_LOAD(__ldcg)
FASTGEN_CACHED_LOAD(__ldcs)
#undef FASTGEN_CACHED_LOAD

#define FASTGEN_CACHED_STORE(name)                                                                                \
  template <class T>                                                                                              \
  void name(T* to, T value) {                                                                                     \
    *to = value;                                                                                                  \
  }
FASTGEN_CACHED_STORE(__stcg)
FASTGEN_CACHED_STORE(__stcs)
FASTGEN_CACHED_STORE(__stwb)
FASTGEN_CACHED_STORE(__stwt)
#undef FASTGEN_CACHED_STORE

// Blocks run one after another, and fences of a block order what only its own threads see: nothing to do. The
// thread sanitizer does not know fences, so what only a fence orders it reports.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { throw fastgen::emulation::KernelError("__trap()"); }

// Atomics, relaxed as on the device. None on floating types: the order of their additions is no one's, and results
// would change from run to run.

namespace fastgen::emulation {

template <class T, class Update>
T atomic_update(T* address, Update update) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, update(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace fastgen::emulation

#define FASTGEN_ATOMIC(name, expression)                                                                          \
  template <class T>                                                                                              \
  T name(T* address, std::common_type_t<T> b) {                                                                   \
    return fastgen::emulation::atomic_update(address, [b](T a) -> T { return expression; });                      \
  }
FASTGEN_ATOMIC(atomicAdd, a + b)
FASTGEN_ATOMIC(atomicSub, a - b)
FASTGEN_ATOMIC(atomicMin, a < b ? a : b)
FASTGEN_ATOMIC(atomicMax, a > b ? a : b)
FASTGEN_ATOMIC(atomicAnd, a& b)
FASTGEN_ATOMIC(atomicOr, a | b)
FASTGEN_ATOMIC(atomicXor, a ^ b)
FASTGEN_ATOMIC(atomicExch, b)
FASTGEN_ATOMIC(atomicInc, a >= b ? 0 : a + 1)
#undef FASTGEN_ATOMIC

template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> desired) {
  return fastgen::emulation::atomic_update(address, [=](T a) { return a == expected ? desired : a; });
}
