// Vectors of 64 bytes: what AVX-512 has (F, DQ, BW, VL).
// Read by simd.h, once.

#include "simd_x86.h"

namespace fastgen::FASTGEN_ISA_NS {

#define FASTGEN_VEC512(T, REG, S, W, MASK)                                                                        \
  template <>                                                                                                     \
  struct Mask<T> {                                                                                                \
    MASK m;                                                                                                       \
    static Mask first(int n) { return {static_cast<MASK>((1u << n) - 1u)}; }                                      \
    bool any() const { return m != 0; }                                                                           \
    unsigned bits() const { return m; }                                                                           \
  };                                                                                                              \
  inline Mask<T> operator&(Mask<T> a, Mask<T> b) { return {static_cast<MASK>(a.m & b.m)}; }                       \
  inline Mask<T> operator|(Mask<T> a, Mask<T> b) { return {static_cast<MASK>(a.m | b.m)}; }                       \
  inline Mask<T> operator~(Mask<T> a) { return {static_cast<MASK>(~a.m)}; }                                       \
  template <>                                                                                                     \
  struct Vec<T> {                                                                                                 \
    static constexpr int width = W;                                                                               \
    REG v;                                                                                                        \
    Vec() = default;                                                                                              \
    Vec(REG r) : v(r) {}                                                                                          \
    Vec(T s) : v(_mm512_set1_##S(s)) {}                                                                           \
    static Vec load(const T* p) { return _mm512_loadu_##S(p); }                                                   \
    static Vec load_n(const T* p, int n) { return _mm512_maskz_loadu_##S(Mask<T>::first(n).m, p); }               \
    void store(T* p) const { _mm512_storeu_##S(p, v); }                                                           \
    void stream(T* p) const { _mm512_stream_##S(p, v); }                                                          \
    void store_n(T* p, int n) const { _mm512_mask_storeu_##S(p, Mask<T>::first(n).m, v); }                        \
  };                                                                                                              \
  inline Vec<T> operator+(Vec<T> a, Vec<T> b) { return _mm512_add_##S(a.v, b.v); }                                \
  inline Vec<T> operator-(Vec<T> a, Vec<T> b) { return _mm512_sub_##S(a.v, b.v); }                                \
  inline Vec<T> operator*(Vec<T> a, Vec<T> b) { return _mm512_mul_##S(a.v, b.v); }                                \
  inline Vec<T> operator/(Vec<T> a, Vec<T> b) { return _mm512_div_##S(a.v, b.v); }                                \
  inline Vec<T> operator-(Vec<T> a) { return _mm512_xor_##S(a.v, _mm512_set1_##S(T(-0.0))); }                     \
  inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) { return _mm512_fmadd_##S(a.v, b.v, c.v); }                     \
  inline Vec<T> fnma(Vec<T> a, Vec<T> b, Vec<T> c) { return _mm512_fnmadd_##S(a.v, b.v, c.v); }                   \
  inline Vec<T> min(Vec<T> a, Vec<T> b) { return _mm512_min_##S(a.v, b.v); }                                      \
  inline Vec<T> max(Vec<T> a, Vec<T> b) { return _mm512_max_##S(a.v, b.v); }                                      \
  inline Vec<T> abs(Vec<T> a) { return _mm512_abs_##S(a.v); }                                                     \
  inline Vec<T> sqrt(Vec<T> a) { return _mm512_sqrt_##S(a.v); }                                                   \
  inline Mask<T> operator<(Vec<T> a, Vec<T> b) { return {_mm512_cmp_##S##_mask(a.v, b.v, _CMP_LT_OQ)}; }          \
  inline Mask<T> operator<=(Vec<T> a, Vec<T> b) { return {_mm512_cmp_##S##_mask(a.v, b.v, _CMP_LE_OQ)}; }         \
  inline Mask<T> operator==(Vec<T> a, Vec<T> b) { return {_mm512_cmp_##S##_mask(a.v, b.v, _CMP_EQ_OQ)}; }         \
  inline Mask<T> is_nan(Vec<T> a) { return {_mm512_cmp_##S##_mask(a.v, a.v, _CMP_UNORD_Q)}; }                     \
  inline Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) { return _mm512_mask_blend_##S(m.m, b.v, a.v); }
FASTGEN_VEC512(float, __m512, ps, 16, __mmask16)
FASTGEN_VEC512(double, __m512d, pd, 8, __mmask8)
#undef FASTGEN_VEC512

// 32-bit words, as many as Vec<float> has lanes; signedness is in the operation's name.
struct Words {
  static constexpr int width = 16;
  __m512i v;
  Words() = default;
  Words(__m512i r) : v(r) {}
  Words(std::uint32_t s) : v(_mm512_set1_epi32(static_cast<int>(s))) {}
  static Words load(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  void store(std::uint32_t* p) const { _mm512_storeu_si512(p, v); }
  template <int N>
  Words shl() const {
    return _mm512_slli_epi32(v, N);
  }
  template <int N>
  Words shr() const {
    return _mm512_srli_epi32(v, N);
  }
  // All ones where the top bit is set.
  Words sign() const { return _mm512_srai_epi32(v, 31); }
};
inline Words operator+(Words a, Words b) { return _mm512_add_epi32(a.v, b.v); }
inline Words operator-(Words a, Words b) { return _mm512_sub_epi32(a.v, b.v); }
inline Words operator&(Words a, Words b) { return _mm512_and_si512(a.v, b.v); }
inline Words operator|(Words a, Words b) { return _mm512_or_si512(a.v, b.v); }
inline Words operator^(Words a, Words b) { return _mm512_xor_si512(a.v, b.v); }
// a with its sign turned where the top bit of m is set.
inline Vec<float> flip_sign(Vec<float> a, Words m) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a.v), m.v, sign, 0x78));
}
inline Words bits(Vec<float> a) { return _mm512_castps_si512(a.v); }
inline Vec<float> as_float(Words a) { return _mm512_castsi512_ps(a.v); }
inline Vec<float> int_to_float(Words a) { return _mm512_cvtepi32_ps(a.v); }
inline Vec<float> fraction(Vec<float> a) { return _mm512_getmant_ps(a.v, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src); }
inline Vec<float> exponent(Vec<float> a) { return _mm512_getexp_ps(a.v); }
// a where the top bit of m is set, else b.
inline Vec<float> select_sign(Words m, Vec<float> a, Vec<float> b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(m.v), b.v, a.v);
}

// Half as many 64-bit words.
struct WideWords {
  static constexpr int width = 8;
  __m512i v;
  WideWords() = default;
  WideWords(__m512i r) : v(r) {}
  WideWords(std::uint64_t s) : v(_mm512_set1_epi64(static_cast<long long>(s))) {}
  static WideWords load(const std::uint64_t* p) { return _mm512_loadu_si512(p); }
  WideWords high() const { return _mm512_srli_epi64(v, 32); }
};
inline WideWords operator+(WideWords a, WideWords b) { return _mm512_add_epi64(a.v, b.v); }
inline WideWords xor3(WideWords a, WideWords b, WideWords c) {
  return _mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96);
}
// The 64-bit product of the low halves.
inline WideWords mul_low(WideWords a, WideWords b) { return _mm512_mul_epu32(a.v, b.v); }
// The low halves, those of `even` in the even lanes.
inline Words interleave_low(WideWords even, WideWords odd) {
  return _mm512_mask_blend_epi32(0xaaaa, even.v, _mm512_slli_epi64(odd.v, 32));
}
// Transposes the 4 x 4 matrices that 4 lanes of 4 vectors form.
inline void transpose4(Words (&w)[4]) {
  const __m512i ab0 = _mm512_unpacklo_epi32(w[0].v, w[1].v), ab1 = _mm512_unpackhi_epi32(w[0].v, w[1].v);
  const __m512i cd0 = _mm512_unpacklo_epi32(w[2].v, w[3].v), cd1 = _mm512_unpackhi_epi32(w[2].v, w[3].v);
  w[0] = _mm512_unpacklo_epi64(ab0, cd0);
  w[1] = _mm512_unpackhi_epi64(ab0, cd0);
  w[2] = _mm512_unpacklo_epi64(ab1, cd1);
  w[3] = _mm512_unpackhi_epi64(ab1, cd1);
}
inline Vec<double> low_half(Vec<float> a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)); }
inline Vec<double> high_half(Vec<float> a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)); }

inline Vec<float> load(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline Vec<float> load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(BFloat16* p, Vec<float> a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i kept = _mm512_mask_blend_epi32(is_nan(a).m, rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
inline void store(Half* p, Vec<float> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}

// a * 2^n, rounded once, for n in [-252, 254]; the third argument is of the other paths.
FASTGEN_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n, Vec<float>) { return _mm512_scalef_ps(a.v, n.v); }

inline float sum(Vec<float> a) {
  return sum8(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
inline double sum(Vec<double> a) {
  return sum4(_mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1)));
}

inline float least(Vec<float> a) { return _mm512_reduce_min_ps(a.v); }
inline double least(Vec<double> a) { return _mm512_reduce_min_pd(a.v); }

inline Vec<float> lane_sums(const Vec<float> (&v)[16]) {
  __m512 quad[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = v[4 * i].v, b = v[4 * i + 1].v, c = v[4 * i + 2].v, d = v[4 * i + 3].v;
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quad[i] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

}  // namespace fastgen::FASTGEN_ISA_NS
