// Vectors of float, double and 32-bit words for one instruction set. Read once per instruction set by
// foreach_isa.h (so: no include guard, no system headers here); FASTGEN_ISA_NS names the set.
//
// Vec<T>: `width` lanes of T. Arithmetic is IEEE, fma() is a true fused multiply-add on AVX2 and AVX-512 and
// a*b + c on the portable path. Compile with -ffp-contract=off, so the same source gives the same bits on AVX2
// and AVX-512 lane by lane. half and bfloat16 exist only in memory: load/store convert from and to float.

namespace fastgen::FASTGEN_ISA_NS {

template <class T>
struct Vec;
template <class T>
struct Mask;

#if defined(FASTGEN_SIMD_AVX512)

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

#elif defined(FASTGEN_SIMD_AVX2)

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

#else  // portable: pairs of 16-byte vectors of the compiler's own kind, which it maps to what the target has

#define FASTGEN_EACH for (int i = 0; i < 2; ++i)

template <class T>
struct Part {
  typedef T type __attribute__((vector_size(16)));
};
template <class T>
using part_t = typename Part<T>::type;
template <class T>
using lane_mask_t = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <class T>
struct Mask {
  using Int = lane_mask_t<T>;
  static constexpr int width = 32 / sizeof(T);
  part_t<Int> m[2];
  static FASTGEN_INLINE Mask first(int n) {
    Int lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = i < n ? -1 : 0;
    Mask r;
    std::memcpy(r.m, lanes, sizeof(lanes));
    return r;
  }
  friend FASTGEN_INLINE Mask operator&(Mask a, Mask b) {
    FASTGEN_EACH a.m[i] &= b.m[i];
    return a;
  }
  friend FASTGEN_INLINE Mask operator|(Mask a, Mask b) {
    FASTGEN_EACH a.m[i] |= b.m[i];
    return a;
  }
  friend FASTGEN_INLINE Mask operator~(Mask a) {
    FASTGEN_EACH a.m[i] = ~a.m[i];
    return a;
  }
  bool any() const {
    const part_t<Int> either = m[0] | m[1];
    std::uint64_t words[2];
    std::memcpy(words, &either, sizeof(words));
    return (words[0] | words[1]) != 0;
  }
  unsigned bits() const {
    Int lanes[width];
    std::memcpy(lanes, m, sizeof(lanes));
    unsigned r = 0;
    for (int i = 0; i < width; ++i) r |= static_cast<unsigned>(lanes[i] & 1) << i;
    return r;
  }
};

// a < b ? a : b and a > b ? a : b. gcc does not find the instructions for them in the conditional expression.
#if defined(__x86_64__)
FASTGEN_INLINE part_t<float> least_of(part_t<float> a, part_t<float> b) { return _mm_min_ps(a, b); }
FASTGEN_INLINE part_t<float> greatest_of(part_t<float> a, part_t<float> b) { return _mm_max_ps(a, b); }
FASTGEN_INLINE part_t<double> least_of(part_t<double> a, part_t<double> b) { return _mm_min_pd(a, b); }
FASTGEN_INLINE part_t<double> greatest_of(part_t<double> a, part_t<double> b) { return _mm_max_pd(a, b); }
#else
template <class P>
FASTGEN_INLINE P least_of(P a, P b) {
  return a < b ? a : b;
}
template <class P>
FASTGEN_INLINE P greatest_of(P a, P b) {
  return a > b ? a : b;
}
#endif

template <class T>
struct Vec {
  using P = part_t<T>;
  using I = part_t<lane_mask_t<T>>;
  static constexpr int width = 32 / sizeof(T);
  P v[2];
  Vec() = default;
  FASTGEN_INLINE Vec(T s) {
    if constexpr (sizeof(T) == 4) {
      v[0] = v[1] = P{s, s, s, s};
    } else {
      v[0] = v[1] = P{s, s};
    }
  }
  static FASTGEN_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static FASTGEN_INLINE Vec load_n(const T* p, int n) {
    Vec r(T(0));
    std::memcpy(r.v, p, static_cast<std::size_t>(n) * sizeof(T));
    return r;
  }
  FASTGEN_INLINE void store(T* p) const { std::memcpy(p, v, sizeof(v)); }
  FASTGEN_INLINE void stream(T* p) const { store(p); }
  FASTGEN_INLINE void store_n(T* p, int n) const { std::memcpy(p, v, static_cast<std::size_t>(n) * sizeof(T)); }
#define FASTGEN_LANEWISE(NAME, EXPRESSION)                                                                        \
  friend FASTGEN_INLINE Vec NAME(Vec a, Vec b) {                                                                  \
    FASTGEN_EACH a.v[i] = EXPRESSION;                                                                             \
    return a;                                                                                                     \
  }
  FASTGEN_LANEWISE(operator+, a.v[i] + b.v[i])
  FASTGEN_LANEWISE(operator-, a.v[i] - b.v[i])
  FASTGEN_LANEWISE(operator*, a.v[i] * b.v[i])
  FASTGEN_LANEWISE(operator/, a.v[i] / b.v[i])
  FASTGEN_LANEWISE(min, least_of(a.v[i], b.v[i]))
  FASTGEN_LANEWISE(max, greatest_of(a.v[i], b.v[i]))
#undef FASTGEN_LANEWISE
  friend FASTGEN_INLINE Vec operator-(Vec a) {
    FASTGEN_EACH a.v[i] = -a.v[i];
    return a;
  }
  friend FASTGEN_INLINE Vec abs(Vec a) {
    FASTGEN_EACH a.v[i] =
        reinterpret_cast<P>(reinterpret_cast<I>(a.v[i]) & ~reinterpret_cast<I>(Vec(T(-0.0)).v[i]));
    return a;
  }
  friend FASTGEN_INLINE Vec sqrt(Vec a) {
    for (int i = 0; i < width; ++i)
      a.v[i * 2 / width][i % (width / 2)] = std::sqrt(a.v[i * 2 / width][i % (width / 2)]);
    return a;
  }
#define FASTGEN_LANEWISE(NAME, EXPRESSION)                                                                        \
  friend FASTGEN_INLINE Mask<T> NAME(Vec a, Vec b) {                                                              \
    Mask<T> r;                                                                                                    \
    FASTGEN_EACH r.m[i] = reinterpret_cast<I>(EXPRESSION);                                                        \
    return r;                                                                                                     \
  }
  FASTGEN_LANEWISE(operator<, a.v[i] < b.v[i])
  FASTGEN_LANEWISE(operator<=, a.v[i] <= b.v[i])
  FASTGEN_LANEWISE(operator==, a.v[i] == b.v[i])
#undef FASTGEN_LANEWISE
  friend FASTGEN_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  friend FASTGEN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
  friend FASTGEN_INLINE Mask<T> is_nan(Vec a) { return ~(a == a); }
  friend FASTGEN_INLINE Vec select(Mask<T> m, Vec a, Vec b) {
    FASTGEN_EACH a.v[i] =
        reinterpret_cast<P>((m.m[i] & reinterpret_cast<I>(a.v[i])) | (~m.m[i] & reinterpret_cast<I>(b.v[i])));
    return a;
  }
};

struct Words {
  using P = part_t<std::uint32_t>;
  static constexpr int width = Vec<float>::width;
  P v[2];
  Words() = default;
  FASTGEN_INLINE Words(std::uint32_t s) { v[0] = v[1] = P{s, s, s, s}; }
  static FASTGEN_INLINE Words load(const std::uint32_t* p) {
    Words r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  FASTGEN_INLINE void store(std::uint32_t* p) const { std::memcpy(p, v, sizeof(v)); }
#define FASTGEN_LANEWISE(OPERATOR)                                                                                \
  friend FASTGEN_INLINE Words operator OPERATOR(Words a, Words b) {                                               \
    FASTGEN_EACH a.v[i] = a.v[i] OPERATOR b.v[i];                                                                 \
    return a;                                                                                                     \
  }
  FASTGEN_LANEWISE(+)
  FASTGEN_LANEWISE(-)
  FASTGEN_LANEWISE(&)
  FASTGEN_LANEWISE(|)
  FASTGEN_LANEWISE(^)
#undef FASTGEN_LANEWISE
  template <int N>
  FASTGEN_INLINE Words shl() const {
    Words r;
    FASTGEN_EACH r.v[i] = v[i] << N;
    return r;
  }
  template <int N>
  FASTGEN_INLINE Words shr() const {
    Words r;
    FASTGEN_EACH r.v[i] = v[i] >> N;
    return r;
  }
  FASTGEN_INLINE Words sign() const {
    Words r;
    FASTGEN_EACH r.v[i] = reinterpret_cast<P>(reinterpret_cast<part_t<std::int32_t>>(v[i]) >> 31);
    return r;
  }
};
FASTGEN_INLINE Words bits(Vec<float> a) {
  Words r;
  FASTGEN_EACH r.v[i] = reinterpret_cast<Words::P>(a.v[i]);
  return r;
}
FASTGEN_INLINE Vec<float> as_float(Words a) {
  Vec<float> r;
  FASTGEN_EACH r.v[i] = reinterpret_cast<part_t<float>>(a.v[i]);
  return r;
}
FASTGEN_INLINE Vec<float> int_to_float(Words a) {
  Vec<float> r;
  FASTGEN_EACH r.v[i] = __builtin_convertvector(reinterpret_cast<part_t<std::int32_t>>(a.v[i]), part_t<float>);
  return r;
}
FASTGEN_INLINE Vec<float> select_sign(Words m, Vec<float> a, Vec<float> b) {
  Mask<float> negative;
  FASTGEN_EACH negative.m[i] = reinterpret_cast<part_t<std::int32_t>>(m.sign().v[i]);
  return select(negative, a, b);
}

struct WideWords {
  using P = part_t<std::uint64_t>;
  static constexpr int width = Words::width / 2;
  P v[2];
  WideWords() = default;
  FASTGEN_INLINE WideWords(std::uint64_t s) { v[0] = v[1] = P{s, s}; }
  static FASTGEN_INLINE WideWords load(const std::uint64_t* p) {
    WideWords r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  FASTGEN_INLINE WideWords high() const {
    WideWords r;
    FASTGEN_EACH r.v[i] = v[i] >> 32;
    return r;
  }
  friend FASTGEN_INLINE WideWords operator+(WideWords a, WideWords b) {
    FASTGEN_EACH a.v[i] += b.v[i];
    return a;
  }
  friend FASTGEN_INLINE WideWords xor3(WideWords a, WideWords b, WideWords c) {
    FASTGEN_EACH a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
  }
  friend FASTGEN_INLINE WideWords mul_low(WideWords a, WideWords b) {
#if defined(__x86_64__)
    FASTGEN_EACH a.v[i] =
        reinterpret_cast<P>(_mm_mul_epu32(reinterpret_cast<__m128i>(a.v[i]), reinterpret_cast<__m128i>(b.v[i])));
#else
    FASTGEN_EACH a.v[i] = (a.v[i] & 0xffffffffu) * (b.v[i] & 0xffffffffu);
#endif
    return a;
  }
  friend FASTGEN_INLINE Words interleave_low(WideWords even, WideWords odd) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half of a 64-bit lane must come first");
    Words r;
    FASTGEN_EACH r.v[i] = reinterpret_cast<Words::P>((even.v[i] & 0xffffffffu) | (odd.v[i] << 32));
    return r;
  }
};
#if defined(__x86_64__)
FASTGEN_INLINE void transpose4(Words (&w)[4]) {
  FASTGEN_EACH {
    __m128 row[4];
    for (int j = 0; j < 4; ++j) row[j] = reinterpret_cast<__m128>(w[j].v[i]);
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    for (int j = 0; j < 4; ++j) w[j].v[i] = reinterpret_cast<Words::P>(row[j]);
  }
}
#else
FASTGEN_INLINE void transpose4(Words (&w)[4]) {
  std::uint32_t lanes[4][Words::width];
  for (int j = 0; j < 4; ++j) w[j].store(lanes[j]);
  for (int block = 0; block < Words::width; block += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) std::swap(lanes[i][block + j], lanes[j][block + i]);
    }
  }
  for (int j = 0; j < 4; ++j) w[j] = Words::load(lanes[j]);
}
#endif
FASTGEN_INLINE Vec<double> low_half(Vec<float> a) {
  double lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = static_cast<double>(a.v[0][i]);
  return Vec<double>::load(lanes);
}
FASTGEN_INLINE Vec<double> high_half(Vec<float> a) {
  double lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = static_cast<double>(a.v[1][i]);
  return Vec<double>::load(lanes);
}

template <class H>
FASTGEN_INLINE Vec<float> load(const H* p) {
  float lanes[Vec<float>::width];
  for (int i = 0; i < Vec<float>::width; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec<float>::load(lanes);
}
template <class H>
FASTGEN_INLINE void store(H* p, Vec<float> a) {
  float lanes[Vec<float>::width];
  a.store(lanes);
  for (int i = 0; i < Vec<float>::width; ++i) p[i] = static_cast<H>(lanes[i]);
}

#undef FASTGEN_EACH

#endif

// Rounding to integers: n = (x + kRoundingShift) - kRoundingShift for |x| <= 2^21. The lowest bits of the sum hold
// n + 254, ready to become two biased exponents.
constexpr float kRoundingShift = 0x1.8p23f + 254.0f;

// a * 2^n, rounded once, for n in [-252, 254]; `shifted` is n + kRoundingShift.
#if defined(FASTGEN_SIMD_AVX512)
FASTGEN_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n, Vec<float>) { return _mm512_scalef_ps(a.v, n.v); }
#else
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

// Stores past the caches are not ordered with others, such as those that tell another thread of the work done:
// stream_end() comes after the last one.
inline void stream_end() {
#if defined(FASTGEN_SIMD_AVX512) || defined(FASTGEN_SIMD_AVX2)
  _mm_sfence();
#endif
}

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
#if defined(FASTGEN_SIMD_AVX512) || defined(FASTGEN_SIMD_AVX2)
// The same tree in registers.
inline float sum8(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline double sum4(__m256d a) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
#endif
#if defined(FASTGEN_SIMD_AVX512)
template <>
inline float sum(Vec<float> a) {
  return sum8(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
template <>
inline double sum(Vec<double> a) {
  return sum4(_mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1)));
}
#elif defined(FASTGEN_SIMD_AVX2)
template <>
inline float sum(Vec<float> a) {
  return sum8(a.v);
}
template <>
inline double sum(Vec<double> a) {
  return sum4(a.v);
}
#endif

// The smallest lane. Which of 0 and -0 counts as smaller is left open.
template <class T>
inline T least(Vec<T> a) {
  return reduce(a, [](T x, T y) { return x < y ? x : y; });
}
#if defined(FASTGEN_SIMD_AVX512)
template <>
inline float least(Vec<float> a) {
  return _mm512_reduce_min_ps(a.v);
}
template <>
inline double least(Vec<double> a) {
  return _mm512_reduce_min_pd(a.v);
}
#elif defined(FASTGEN_SIMD_AVX2)
template <>
inline float least(Vec<float> a) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
#endif

// Lane i of the result is the sum of the lanes of v[i].
template <class T>
inline Vec<T> lane_sums(const Vec<T> (&v)[Vec<T>::width]) {
  alignas(64) T lanes[Vec<T>::width];
  for (int i = 0; i < Vec<T>::width; ++i) lanes[i] = sum(v[i]);
  return Vec<T>::load(lanes);
}
#if defined(FASTGEN_SIMD_AVX512)
template <>
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
#elif defined(FASTGEN_SIMD_AVX2)
template <>
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
#endif

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
