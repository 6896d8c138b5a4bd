// What AVX2 and AVX-512 share. Read by simd.h, once for each.

namespace fastgen::FASTGEN_ISA_NS {

inline void stream_end() { _mm_sfence(); }

// The tree of reduce() in registers.
inline float sum8(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline double sum4(__m256d a) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

}  // namespace fastgen::FASTGEN_ISA_NS
