// Vectors of float, double and 32-bit words for one instruction set. Read once per instruction set by
// foreach_isa.h (so: no include guard, no system headers here); FASTGEN_ISA_NS names the set.
//
// Vec<T>: `width` lanes of T. Arithmetic is IEEE, fma() is a true fused multiply-add on AVX2 and AVX-512 and
// a*b + c on the portable path. Compile with -ffp-contract=off, so the same source gives the same bits on AVX2
// and AVX-512 lane by lane. half and bfloat16 exist only in memory: load/store convert from and to float.
//
// simd_avx512.h, simd_avx2.h and simd_portable.h have what is particular to a set; here is what they share. Where
// one of them has a function of its own for Vec<float> or Vec<double>, it is taken before the template here.

namespace fastgen::FASTGEN_ISA_NS {

template <class T>
struct Vec;
template <class T>
struct Mask;

}  // namespace fastgen::FASTGEN_ISA_NS

#if defined(FASTGEN_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(FASTGEN_SIMD_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace fastgen::FASTGEN_ISA_NS {

// Rounding to integers: n = (x + kRoundingShift) - kRoundingShift for |x| <= 2^21. The lowest bits of the sum hold
// n + 254, ready to become two biased exponents.
constexpr float kRoundingShift = 0x1.8p23f + 254.0f;

#if !defined(FASTGEN_SIMD_AVX512)
// a * 2^n, rounded once, for n in [-252, 254]; `shifted` is n + kRoundingShift.
FASTGEN_INLINE Vec<float> scale2(Vec<float> a, Vec<float>, Vec<float> shifted) {
  // Two factors reach the subnormals and infinity without leaving the range of one.
  const Words exponents = bits(shifted), half = exponents.shr<1>();
  return a * as_float(half.shl<23>()) * as_float((exponents - half).shl<23>());
}

inline Vec<float> flip_sign(Vec<float> a, Words m) { return as_float(bits(a) ^ (m & Words(0x80000000u))); }

// The fraction in [1/2, 1) of a positive normal number, and its exponent: a = fraction * 2^(exponent + 1).
FASTGEN_INLINE Vec<float> fraction(Vec<float> a) {
  return as_float((bits(a) & Words(0x007fffffu)) | Words(0x3f000000u));
}
FASTGEN_INLINE Vec<float> exponent(Vec<float> a) { return int_to_float(bits(a).shr<23>()) - Vec<float>(127.0f); }
#endif

inline Vec<float> load(const float* p) { return Vec<float>::load(p); }
inline Vec<double> load(const double* p) { return Vec<double>::load(p); }
inline void store(float* p, Vec<float> a) { a.store(p); }
inline void store(double* p, Vec<double> a) { a.store(p); }

// The first n lanes (0 <= n < width); the others read as zero and are not written.
inline Vec<float> load_n(const float* p, int n) { return Vec<float>::load_n(p, n); }
inline Vec<double> load_n(const double* p, int n) { return Vec<double>::load_n(p, n); }
inline void store_n(float* p, Vec<float> a, int n) { a.store_n(p, n); }
inline void store_n(double* p, Vec<double> a, int n) { a.store_n(p, n); }

template <class H>
inline Vec<float> load_n(const H* p, int n) {
  alignas(64) H lanes[Vec<float>::width] = {};
  std::memcpy(static_cast<void*>(lanes), p, static_cast<std::size_t>(n) * sizeof(H));
  return load(static_cast<const H*>(lanes));
}
template <class H>
inline void store_n(H* p, Vec<float> a, int n) {
  alignas(64) H lanes[Vec<float>::width];
  store(static_cast<H*>(lanes), a);
  std::memcpy(static_cast<void*>(p), lanes, static_cast<std::size_t>(n) * sizeof(H));
}

// The first n lanes, n <= width.
template <class S>
inline auto load_lanes(const S* p, int n) {
  using V = decltype(load(p));
  return n == V::width ? load(p) : load_n(p, n);
}
template <class S, class V>
inline void store_lanes(S* p, V v, int n) {
  n == V::width ? store(p, v) : store_n(p, v, n);
}

template <class S, class T>
inline void store_lanes(S* p, Vec<T> a, int n) {
  n == Vec<T>::width ? store(p, a) : store_n(p, a, n);
}

// How whole vectors are stored: into the caches, or past them, which leaves the caches to the inputs and spares
// reading what is overwritten.
struct IntoCaches {
  template <class S, class T>
  FASTGEN_INLINE void operator()(S* p, Vec<T> a) const {
    store(p, a);
  }
};
struct PastCaches {
  template <class T>
  FASTGEN_INLINE void operator()(T* p, Vec<T> a) const {
    a.stream(p);
  }
};

// stream_end() of the set comes after the last store past the caches: they are not ordered with others, such as
// those that tell another thread of the work done.

// f(put) with put(p, vector) storing what is wanted, for n elements from `out`. Only aligned whole vectors can go
// past the caches.
template <class S, class F>
FASTGEN_INLINE void with_stores(bool past_caches, std::int64_t n, F f, const S* out) {
  if constexpr (std::is_same_v<S, acc_t<S>>) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(out) % sizeof(Vec<S>) == 0;
    if (past_caches && aligned && n % Vec<S>::width == 0) return f(PastCaches{});
  }
  f(IntoCaches{});
}

// put(out + i, f(load(in + i)...)) for n elements of each pointer.
template <class Put, class S, class F, class... In>
FASTGEN_INLINE void transform_put(std::int64_t n, Put put, S* out, F f, const In*... in) {
  constexpr int kWidth = decltype(load(out))::width;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) put(out + i, f(load(in + i)...));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_n(out + i, f(load_n(in + i, rest)...), rest);
  }
}
template <class S, class F, class... In>
inline void transform(std::int64_t n, S* out, F f, const In*... in) {
  transform_put(n, IntoCaches{}, out, f, in...);
}

// Lanes combined in a fixed tree, so the same lanes give the same bits.
template <class T, class F>
inline T reduce(Vec<T> a, F combine) {
  alignas(64) T lanes[Vec<T>::width];
  a.store(lanes);
  for (int half = Vec<T>::width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}
template <class T>
inline T sum(Vec<T> a) {
  return reduce(a, [](T x, T y) { return x + y; });
}

// The smallest lane. Which of 0 and -0 counts as smaller is left open.
template <class T>
inline T least(Vec<T> a) {
  return reduce(a, [](T x, T y) { return x < y ? x : y; });
}

// Lane i of the result is the sum of the lanes of v[i].
template <class T>
inline Vec<T> lane_sums(const Vec<T> (&v)[Vec<T>::width]) {
  alignas(64) T lanes[Vec<T>::width];
  for (int i = 0; i < Vec<T>::width; ++i) lanes[i] = sum(v[i]);
  return Vec<T>::load(lanes);
}

// A running sum whose rounding error grows with n / 16 instead of n: short runs are added up first.
template <class T>
struct CascadeSum {
  Vec<T> run{T(0)}, total{T(0)};
  int count = 0;
  void add(Vec<T> a) {
    run = run + a;
    if (++count == 16) {
      total = total + run;
      run = Vec<T>(T(0));
      count = 0;
    }
  }
  T value() const { return sum(total + run); }
};

// Applies a scalar function lane by lane: for double, where no vector version is worth its size.
template <class T, class F>
inline Vec<T> map(Vec<T> a, F f) {
  alignas(64) T lanes[Vec<T>::width];
  a.store(lanes);
  for (int i = 0; i < Vec<T>::width; ++i) lanes[i] = f(lanes[i]);
  return Vec<T>::load(lanes);
}

}  // namespace fastgen::FASTGEN_ISA_NS
