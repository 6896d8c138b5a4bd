// Vectors of 32 bytes: what AVX2, FMA and F16C have.
// Read by simd.h, once.

#include "simd_x86.h"

namespace fastgen::FASTGEN_ISA_NS {

alignas(32) constexpr std::int32_t kTail32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(32) constexpr std::int64_t kTail64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

inline __m256i tail_mask(float, int n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTail32 + 8 - n));
}
inline __m256i tail_mask(double, int n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTail64 + 4 - n));
}

#define FASTGEN_VEC256(T, REG, S, W)                                                                              \
  template <>                                                                                                     \
  struct Mask<T> {                                                                                                \
    REG m;                                                                                                        \
    static Mask first(int n) { return {_mm256_castsi256_##S(tail_mask(T(), n))}; }                                \
    bool any() const { return bits() != 0; }                                                                      \
    unsigned bits() const { return static_cast<unsigned>(_mm256_movemask_##S(m)); }                               \
  };                                                                                                              \
  inline Mask<T> operator&(Mask<T> a, Mask<T> b) { return {_mm256_and_##S(a.m, b.m)}; }                           \
  inline Mask<T> operator|(Mask<T> a, Mask<T> b) { return {_mm256_or_##S(a.m, b.m)}; }                            \
  inline Mask<T> operator~(Mask<T> a) {                                                                           \
    return {_mm256_xor_##S(a.m, _mm256_castsi256_##S(_mm256_set1_epi32(-1)))};                                    \
  }                                                                                                               \
  template <>                                                                                                     \
  struct Vec<T> {                                                                                                 \
    static constexpr int width = W;                                                                               \
    REG v;                                                                                                        \
    Vec() = default;                                                                                              \
    Vec(REG r) : v(r) {}                                                                                          \
    Vec(T s) : v(_mm256_set1_##S(s)) {}                                                                           \
    static Vec load(const T* p) { return _mm256_loadu_##S(p); }                                                   \
    static Vec load_n(const T* p, int n) { return _mm256_maskload_##S(p, tail_mask(T(), n)); }                    \
    void store(T* p) const { _mm256_storeu_##S(p, v); }                                                           \
    void stream(T* p) const { _mm256_stream_##S(p, v); }                                                          \
    void store_n(T* p, int n) const { _mm256_maskstore_##S(p, tail_mask(T(), n), v); }                            \
  };                                                                                                              \
  inline Vec<T> operator+(Vec<T> a, Vec<T> b) { return _mm256_add_##S(a.v, b.v); }                                \
  inline Vec<T> operator-(Vec<T> a, Vec<T> b) { return _mm256_sub_##S(a.v, b.v); }                                \
  inline Vec<T> operator*(Vec<T> a, Vec<T> b) { return _mm256_mul_##S(a.v, b.v); }                                \
  inline Vec<T> operator/(Vec<T> a, Vec<T> b) { return _mm256_div_##S(a.v, b.v); }                                \
  inline Vec<T> operator-(Vec<T> a) { return _mm256_xor_##S(a.v, _mm256_set1_##S(T(-0.0))); }                     \
  inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) { return _mm256_fmadd_##S(a.v, b.v, c.v); }                     \
  inline Vec<T> fnma(Vec<T> a, Vec<T> b, Vec<T> c) { return _mm256_fnmadd_##S(a.v, b.v, c.v); }                   \
  inline Vec<T> min(Vec<T> a, Vec<T> b) { return _mm256_min_##S(a.v, b.v); }                                      \
  inline Vec<T> max(Vec<T> a, Vec<T> b) { return _mm256_max_##S(a.v, b.v); }                                      \
  inline Vec<T> abs(Vec<T> a) { return _mm256_andnot_##S(_mm256_set1_##S(T(-0.0)), a.v); }                        \
  inline Vec<T> sqrt(Vec<T> a) { return _mm256_sqrt_##S(a.v); }                                                   \
  inline Mask<T> operator<(Vec<T> a, Vec<T> b) { return {_mm256_cmp_##S(a.v, b.v, _CMP_LT_OQ)}; }                 \
  inline Mask<T> operator<=(Vec<T> a, Vec<T> b) { return {_mm256_cmp_##S(a.v, b.v, _CMP_LE_OQ)}; }                \
  inline Mask<T> operator==(Vec<T> a, Vec<T> b) { return {_mm256_cmp_##S(a.v, b.v, _CMP_EQ_OQ)}; }                \
  inline Mask<T> is_nan(Vec<T> a) { return {_mm256_cmp_##S(a.v, a.v, _CMP_UNORD_Q)}; }                            \
  inline Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) { return _mm256_blendv_##S(b.v, a.v, m.m); }
FASTGEN_VEC256(float, __m256, ps, 8)
FASTGEN_VEC256(double, __m256d, pd, 4)
#undef FASTGEN_VEC256

struct Words {
  static constexpr int width = 8;
  __m256i v;
  Words() = default;
  Words(__m256i r) : v(r) {}
  Words(std::uint32_t s) : v(_mm256_set1_epi32(static_cast<int>(s))) {}
  static Words load(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  void store(std::uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  template <int N>
  Words shl() const {
    return _mm256_slli_epi32(v, N);
  }
  template <int N>
  Words shr() const {
    return _mm256_srli_epi32(v, N);
  }
  // All ones where the top bit is set.
  Words sign() const { return _mm256_srai_epi32(v, 31); }
};
inline Words operator+(Words a, Words b) { return _mm256_add_epi32(a.v, b.v); }
inline Words operator-(Words a, Words b) { return _mm256_sub_epi32(a.v, b.v); }
inline Words operator&(Words a, Words b) { return _mm256_and_si256(a.v, b.v); }
inline Words operator|(Words a, Words b) { return _mm256_or_si256(a.v, b.v); }
inline Words operator^(Words a, Words b) { return _mm256_xor_si256(a.v, b.v); }
inline Words bits(Vec<float> a) { return _mm256_castps_si256(a.v); }
inline Vec<float> as_float(Words a) { return _mm256_castsi256_ps(a.v); }
inline Vec<float> int_to_float(Words a) { return _mm256_cvtepi32_ps(a.v); }
inline Vec<float> select_sign(Words m, Vec<float> a, Vec<float> b) {
  return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(m.v));
}

struct WideWords {
  static constexpr int width = 4;
  __m256i v;
  WideWords() = default;
  WideWords(__m256i r) : v(r) {}
  WideWords(std::uint64_t s) : v(_mm256_set1_epi64x(static_cast<long long>(s))) {}
  static WideWords load(const std::uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  WideWords high() const { return _mm256_srli_epi64(v, 32); }
};
inline WideWords operator+(WideWords a, WideWords b) { return _mm256_add_epi64(a.v, b.v); }
inline WideWords xor3(WideWords a, WideWords b, WideWords c) {
  return _mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v);
}
inline WideWords mul_low(WideWords a, WideWords b) { return _mm256_mul_epu32(a.v, b.v); }
inline Words interleave_low(WideWords even, WideWords odd) {
  return _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xaa);
}
inline void transpose4(Words (&w)[4]) {
  const __m256i ab0 = _mm256_unpacklo_epi32(w[0].v, w[1].v), ab1 = _mm256_unpackhi_epi32(w[0].v, w[1].v);
  const __m256i cd0 = _mm256_unpacklo_epi32(w[2].v, w[3].v), cd1 = _mm256_unpackhi_epi32(w[2].v, w[3].v);
  w[0] = _mm256_unpacklo_epi64(ab0, cd0);
  w[1] = _mm256_unpackhi_epi64(ab0, cd0);
  w[2] = _mm256_unpacklo_epi64(ab1, cd1);
  w[3] = _mm256_unpackhi_epi64(ab1, cd1);
}
inline Vec<double> low_half(Vec<float> a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)); }
inline Vec<double> high_half(Vec<float> a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)); }

inline Vec<float> load(const BFloat16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline Vec<float> load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(BFloat16* p, Vec<float> a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i kept =
      _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan(a).m));
  const __m256i h = _mm256_srli_epi32(kept, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Half* p, Vec<float> a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
}

inline float sum(Vec<float> a) { return sum8(a.v); }
inline double sum(Vec<double> a) { return sum4(a.v); }

inline float least(Vec<float> a) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

inline Vec<float> lane_sums(const Vec<float> (&v)[8]) {
  __m256 quad[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 a = v[4 * i].v, b = v[4 * i + 1].v, c = v[4 * i + 2].v, d = v[4 * i + 3].v;
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    quad[i] = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                       _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

}  // namespace fastgen::FASTGEN_ISA_NS
