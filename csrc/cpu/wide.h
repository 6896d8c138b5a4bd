// The lanes of a Vec<T> as doubles, for sums that must not lose what T loses. Read once per instruction set by
// the kernels that need it, after simd.h.

namespace fastgen::FASTGEN_ISA_NS {

template <class T>
struct Wide {
  static constexpr int parts = sizeof(double) / sizeof(T);
  Vec<double> part[parts];
  Wide() : Wide(0.0) {}
  explicit Wide(double s) {
    for (int i = 0; i < parts; ++i) part[i] = Vec<double>(s);
  }
};

template <class T, class F, class... In>
FASTGEN_INLINE Wide<T> map_parts(F f, Wide<T> first, In... rest) {
  for (int i = 0; i < Wide<T>::parts; ++i) first.part[i] = f(first.part[i], rest.part[i]...);
  return first;
}
template <class T>
FASTGEN_INLINE Wide<T> operator+(Wide<T> a, Wide<T> b) {
  return map_parts([](Vec<double> x, Vec<double> y) { return x + y; }, a, b);
}
template <class T>
FASTGEN_INLINE Wide<T> operator-(Wide<T> a, Wide<T> b) {
  return map_parts([](Vec<double> x, Vec<double> y) { return x - y; }, a, b);
}
template <class T>
FASTGEN_INLINE Wide<T> operator*(Wide<T> a, Wide<T> b) {
  return map_parts([](Vec<double> x, Vec<double> y) { return x * y; }, a, b);
}
template <class T>
FASTGEN_INLINE Wide<T> operator/(Wide<T> a, Wide<T> b) {
  return map_parts([](Vec<double> x, Vec<double> y) { return x / y; }, a, b);
}
template <class T>
FASTGEN_INLINE Wide<T> fma(Wide<T> a, Wide<T> b, Wide<T> c) {
  return map_parts([](Vec<double> x, Vec<double> y, Vec<double> z) { return fma(x, y, z); }, a, b, c);
}
template <class T>
FASTGEN_INLINE Wide<T> sqrt(Wide<T> a) {
  return map_parts([](Vec<double> x) { return sqrt(x); }, a);
}
// b where either is NaN.
template <class T>
FASTGEN_INLINE Wide<T> max(Wide<T> a, Wide<T> b) {
  return map_parts([](Vec<double> x, Vec<double> y) { return max(x, y); }, a, b);
}
template <class T>
inline double sum(Wide<T> a) {
  for (int i = 1; i < Wide<T>::parts; ++i) a.part[0] = a.part[0] + a.part[i];
  return sum(a.part[0]);
}

FASTGEN_INLINE Wide<double> widen(Vec<double> a) {
  Wide<double> r;
  r.part[0] = a;
  return r;
}
FASTGEN_INLINE Wide<float> widen(Vec<float> a) {
  Wide<float> r;
  r.part[0] = low_half(a);
  r.part[1] = high_half(a);
  return r;
}
FASTGEN_INLINE Vec<double> narrow(Wide<double> a) { return a.part[0]; }
FASTGEN_INLINE Vec<float> narrow(Wide<float> a) {
#if defined(FASTGEN_SIMD_AVX512)
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(a.part[0].v));
  return _mm512_insertf32x8(low, _mm512_cvtpd_ps(a.part[1].v), 1);
#elif defined(FASTGEN_SIMD_AVX2)
  const __m256 low = _mm256_castps128_ps256(_mm256_cvtpd_ps(a.part[0].v));
  return _mm256_insertf128_ps(low, _mm256_cvtpd_ps(a.part[1].v), 1);
#else
  double wide[Vec<float>::width];
  float lanes[Vec<float>::width];
  for (int i = 0; i < Wide<float>::parts; ++i) a.part[i].store(wide + i * Vec<double>::width);
  for (int i = 0; i < Vec<float>::width; ++i) lanes[i] = static_cast<float>(wide[i]);
  return Vec<float>::load(lanes);
#endif
}

// The first n lanes, n <= Vec<T>::width; the others read as zero and are not written.
template <class S>
FASTGEN_INLINE auto load_wide(const S* p, int n) {
  return widen(load_lanes(p, n));
}
#if defined(FASTGEN_SIMD_AVX512)
// Each half is converted as it is loaded.
FASTGEN_INLINE Wide<float> load_wide(const float* p, int n) {
  if (n < Vec<float>::width) return widen(load_n(p, n));
  Wide<float> r;
  r.part[0] = _mm512_cvtps_pd(_mm256_loadu_ps(p));
  r.part[1] = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8));
  return r;
}
#elif defined(FASTGEN_SIMD_AVX2)
FASTGEN_INLINE Wide<float> load_wide(const float* p, int n) {
  if (n < Vec<float>::width) return widen(load_n(p, n));
  Wide<float> r;
  r.part[0] = _mm256_cvtps_pd(_mm_loadu_ps(p));
  r.part[1] = _mm256_cvtps_pd(_mm_loadu_ps(p + 4));
  return r;
}
#endif

// Vec<T>::width doubles as they lie.
template <class T>
inline Wide<T> load_doubles(const double* p, int n) {
  Wide<T> r;
  for (int i = 0; i < Wide<T>::parts; ++i) {
    const int first = i * Vec<double>::width, rest = n - first;
    if (rest > 0) r.part[i] = load_lanes(p + first, rest < Vec<double>::width ? rest : Vec<double>::width);
  }
  return r;
}
template <class T>
inline void store_doubles(double* p, Wide<T> a, int n) {
  for (int i = 0; i < Wide<T>::parts; ++i) {
    const int first = i * Vec<double>::width, rest = n - first;
    if (rest >= Vec<double>::width) {
      a.part[i].store(p + first);
    } else if (rest > 0) {
      a.part[i].store_n(p + first, rest);
    }
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
