#include "vq_screen_bf16.h"

#include <limits>

#if FASTGEN_BF16

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"))),            \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

namespace fastgen {
namespace {

constexpr int kWidth = 16, kRows = kBf16TileRows;

inline __m512bh as_bf16(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// The least scores of the sets of a group, of panels [first, last), for kRows rows; joined to what is there,
// unless fresh.
void screen_panels(const Bf16Pair* panels, const float* start, std::int64_t pairs, const Bf16Pair* rows,
                   std::int64_t first, std::int64_t last, bool fresh, float* minima, std::int64_t stride) {
  __m512 least[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    least[i] =
        fresh ? _mm512_set1_ps(std::numeric_limits<float>::infinity()) : _mm512_loadu_ps(minima + i * stride);
  }
  for (std::int64_t p = first; p < last; ++p) {
    const Bf16Pair* panel = panels + p * pairs * 2 * kWidth;
    const __m512 start_low = _mm512_loadu_ps(start + p * 2 * kWidth);
    const __m512 start_high = _mm512_loadu_ps(start + p * 2 * kWidth + kWidth);
    __m512 low[kRows], high[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      low[i] = start_low;
      high[i] = start_high;
    }
    for (std::int64_t j = 0; j < pairs; ++j) {
      const __m512bh code_low = as_bf16(_mm512_loadu_si512(panel));
      const __m512bh code_high = as_bf16(_mm512_loadu_si512(panel + kWidth));
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const __m512bh x = as_bf16(_mm512_set1_epi32(static_cast<int>(rows[i * pairs + j])));
        low[i] = _mm512_dpbf16_ps(low[i], x, code_low);
        high[i] = _mm512_dpbf16_ps(high[i], x, code_high);
      }
      panel += 2 * kWidth;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) least[i] = _mm512_min_ps(least[i], _mm512_min_ps(low[i], high[i]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) _mm512_storeu_ps(minima + i * stride, least[i]);
}

}  // namespace

void round_to_bf16(const float* rows, std::int64_t count, std::int64_t size, Bf16Pair* pairs, float* residual) {
  // The square of a small residual may vanish.
  const float vanished = static_cast<float>(size) * std::numeric_limits<float>::min();
  const float rounding = 1.0f + static_cast<float>(size + 8) * std::numeric_limits<float>::epsilon();
  for (std::int64_t i = 0; i < count; ++i) {
    const float* row = rows + i * size;
    Bf16Pair* out = pairs + i * bf16_pairs(size);
    __m512 squares = _mm512_setzero_ps();
    for (std::int64_t j = 0; j < size; j += kWidth) {
      const std::int64_t n = std::min<std::int64_t>(kWidth, size - j);
      const __m512 x = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), row + j);
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
      const __m512 widened = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      const __m512 lost = _mm512_sub_ps(x, widened);
      squares = _mm512_fmadd_ps(lost, lost, squares);
      _mm256_mask_storeu_epi32(out + j / 2, static_cast<__mmask8>((1u << bf16_pairs(n)) - 1u), rounded);
    }
    residual[i] = std::sqrt(_mm512_reduce_add_ps(squares) + vanished) * rounding;
  }
}

void screen_bf16(const SetLayout& sets, const Bf16Pair* panels, const float* start, std::int64_t pairs,
                 const Bf16Pair* rows, std::int64_t tiles, float* minima) {
  const std::int64_t panel_bytes = pairs * 2 * kWidth * static_cast<std::int64_t>(sizeof(Bf16Pair));
  sets.each_tile(tiles, panel_bytes,
                 [&](std::int64_t tile, std::int64_t group, std::int64_t first, std::int64_t last) {
                   screen_panels(panels, start, pairs, rows + tile * kRows * pairs, first, last,
                                 first == group * sets.group_panels(),
                                 minima + tile * kRows * sets.sets() + group * kWidth, sets.sets());
                 });
}

}  // namespace fastgen

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace fastgen {

bool bf16_screening() { return FASTGEN_BF16 != 0 && current_isa() >= Isa::kAvx512Bf16; }

#if !FASTGEN_BF16
void round_to_bf16(const float*, std::int64_t, std::int64_t, Bf16Pair*, float*) {}
void screen_bf16(const SetLayout&, const Bf16Pair*, const float*, std::int64_t, const Bf16Pair*, std::int64_t,
                 float*) {}
#endif

}  // namespace fastgen
