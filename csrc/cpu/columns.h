// Records of k values, one record per element, as k vectors over elements ("columns"), and back.
// Read once per instruction set by the kernels that need it, after simd.h.

namespace fastgen::FASTGEN_ISA_NS {

#if defined(FASTGEN_SIMD_AVX512) || defined(FASTGEN_SIMD_AVX2)

inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const Half* p) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline __m128 load4(const BFloat16* p) {
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h));
}

inline void store4(float* p, __m128 a) { _mm_storeu_ps(p, a); }
inline void store4(Half* p, __m128 a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(a, 0)); }
inline void store4(BFloat16* p, __m128 a) {
  const __m128i u = _mm_castps_si128(a);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(a, a));
  const __m128i h = _mm_srli_epi32(_mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc00000), nan), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(h, h));
}

#if defined(FASTGEN_SIMD_AVX512)

// Rows row, row + 4, row + 8, row + 12: the four 128-bit parts are transposed at once, each within itself.
template <class S>
inline __m512 load_parts(const S* p, std::int64_t stride) {
  __m512 r = _mm512_castps128_ps512(load4(p));
  r = _mm512_insertf32x4(r, load4(p + 4 * stride), 1);
  r = _mm512_insertf32x4(r, load4(p + 8 * stride), 2);
  return _mm512_insertf32x4(r, load4(p + 12 * stride), 3);
}
template <class S>
inline void store_parts(S* p, std::int64_t stride, __m512 a) {
  store4(p, _mm512_castps512_ps128(a));
  store4(p + 4 * stride, _mm512_extractf32x4_ps(a, 1));
  store4(p + 8 * stride, _mm512_extractf32x4_ps(a, 2));
  store4(p + 12 * stride, _mm512_extractf32x4_ps(a, 3));
}
inline void transpose_parts(__m512& a, __m512& b, __m512& c, __m512& d) {
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  a = _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0));
  b = _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0));
  c = _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1));
  d = _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1));
}

#else

template <class S>
inline __m256 load_parts(const S* p, std::int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(load4(p)), load4(p + 4 * stride), 1);
}
template <class S>
inline void store_parts(S* p, std::int64_t stride, __m256 a) {
  store4(p, _mm256_castps256_ps128(a));
  store4(p + 4 * stride, _mm256_extractf128_ps(a, 1));
}
inline void transpose_parts(__m256& a, __m256& b, __m256& c, __m256& d) {
  const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  a = _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0));
  b = _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0));
  c = _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1));
  d = _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1));
}

#endif

// Four columns of one full vector of elements.
template <class S>
inline void load_columns4(const S* p, std::int64_t stride, float* columns) {
  auto a = load_parts(p, stride), b = load_parts(p + stride, stride);
  auto c = load_parts(p + 2 * stride, stride), d = load_parts(p + 3 * stride, stride);
  transpose_parts(a, b, c, d);
  constexpr int w = Vec<float>::width;
  Vec<float>(a).store(columns);
  Vec<float>(b).store(columns + w);
  Vec<float>(c).store(columns + 2 * w);
  Vec<float>(d).store(columns + 3 * w);
}
template <class S>
inline void store_columns4(S* p, std::int64_t stride, const float* columns) {
  constexpr int w = Vec<float>::width;
  auto a = Vec<float>::load(columns).v, b = Vec<float>::load(columns + w).v;
  auto c = Vec<float>::load(columns + 2 * w).v, d = Vec<float>::load(columns + 3 * w).v;
  transpose_parts(a, b, c, d);
  store_parts(p, stride, a);
  store_parts(p + stride, stride, b);
  store_parts(p + 2 * stride, stride, c);
  store_parts(p + 3 * stride, stride, d);
}

constexpr bool kFastColumns = true;

#else

constexpr bool kFastColumns = false;

#endif

// columns[j][lane] = value j of record `lane`, for n records (1 <= n <= width) that lie `stride` apart; lanes past
// the last record repeat it. The last four columns overlap the ones before where k is no multiple of four.
template <class S, class K>
inline void load_columns(const S* p, std::int64_t stride, K k, int n, acc_t<S>* columns) {
  using T = acc_t<S>;
  constexpr int w = Vec<T>::width;
  if constexpr (kFastColumns && std::is_same_v<T, float>) {
    if (n == w && k >= 4) {
      for (std::int64_t j = 0; j + 4 <= k; j += 4) load_columns4(p + j, stride, columns + j * w);
      if (k % 4 != 0) load_columns4(p + k - 4, stride, columns + (k - 4) * w);
      return;
    }
  }
  for (int lane = 0; lane < w; ++lane) {
    const S* record = p + (lane < n ? lane : n - 1) * stride;
    for (std::int64_t j = 0; j < k; ++j) columns[j * w + lane] = static_cast<T>(record[j]);
  }
}

// The reverse; records past the n-th are not written.
template <class S, class K>
inline void store_columns(S* p, std::int64_t stride, K k, int n, const acc_t<S>* columns) {
  using T = acc_t<S>;
  constexpr int w = Vec<T>::width;
  if constexpr (kFastColumns && std::is_same_v<T, float>) {
    if (n == w && k >= 4) {
      for (std::int64_t j = 0; j + 4 <= k; j += 4) store_columns4(p + j, stride, columns + j * w);
      if (k % 4 != 0) store_columns4(p + k - 4, stride, columns + (k - 4) * w);
      return;
    }
  }
  for (int lane = 0; lane < n; ++lane) {
    S* record = p + lane * stride;
    for (std::int64_t j = 0; j < k; ++j) record[j] = static_cast<S>(columns[j * w + lane]);
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
