// Philox words and normal values on vectors, for one instruction set. Included by kernel headers, so it is read
// once per instruction set, and has no include guard; philox.h comes before.
//
// Arithmetic is that of csrc/common, lane by lane, with fused multiply-adds where the instruction set has them.

namespace fastgen::FASTGEN_ISA_NS {

// Elements that one call of philox_vectors makes: 4 of each of Words::width counters.
constexpr int kPhiloxElements = 4 * Words::width;

// Lane i = 4 * g + k (k < 4) works on counter (Words::width / 4) * k + g, so that transpose4 leaves consecutive
// elements in each vector and nothing crosses 128-bit lanes. These are the counters of the even lanes; an odd
// lane's is Words::width / 4 more than that of the lane before it.
#if defined(FASTGEN_SIMD_AVX512)
alignas(64) constexpr std::uint64_t kEvenCounters[8] = {0, 8, 1, 9, 2, 10, 3, 11};
#else
alignas(64) constexpr std::uint64_t kEvenCounters[4] = {0, 4, 1, 5};
#endif

// Two sets of counters in step: one alone would wait for its own multiplications.
FASTGEN_INLINE void philox_rounds(PhiloxKey key, WideWords (&c)[2][4]) {
  // Only the low halves count: mul_low ignores the high ones, which hold leftovers.
  std::uint32_t key0 = static_cast<std::uint32_t>(key.seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideWords k0 = WideWords(std::uint64_t{key0}), k1 = WideWords(std::uint64_t{key1});
    WideWords p0[2], p1[2];
    for (int n = 0; n < 2; ++n) p0[n] = mul_low(c[n][0], WideWords(std::uint64_t{kPhiloxMultiplier0}));
    for (int n = 0; n < 2; ++n) p1[n] = mul_low(c[n][2], WideWords(std::uint64_t{kPhiloxMultiplier1}));
    for (int n = 0; n < 2; ++n) {
      c[n][0] = xor3(p1[n].high(), c[n][1], k0);
      c[n][1] = p1[n];
      c[n][2] = xor3(p0[n].high(), c[n][3], k1);
      c[n][3] = p0[n];
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// Word j of the counters block, block + 1, ... in w[j], in the lane order above.
FASTGEN_INLINE void philox_vectors(PhiloxKey key, std::uint64_t block, Words (&w)[4]) {
  const WideWords zero = WideWords(std::uint64_t{0});
  const WideWords even = WideWords::load(kEvenCounters) + WideWords(key.offset + block);
  const WideWords odd = even + WideWords(std::uint64_t{Words::width / 4});
  WideWords c[2][4] = {{even, even.high(), zero, zero}, {odd, odd.high(), zero, zero}};
  philox_rounds(key, c);
  for (int j = 0; j < 4; ++j) w[j] = interleave_low(c[0][j], c[1][j]);
}

// sqrt(-2 ln u).
FASTGEN_INLINE Vec<float> normal_radius(Words word) {
  using V = Vec<float>;
  const V high = int_to_float(word.shr<16>()) * V(0x1p-16f);
  const V low = fma(int_to_float(word & Words(0xffffu)), V(0x1p-32f), V(0x1p-33f));
  const Words exponent = (bits(high + low) + Words(kOneBits - kTwoThirdsBits)).shr<23>();
  const V scale = as_float((Words(254u) - exponent).shl<23>());
  const V e = int_to_float(exponent - Words(127u));
  const V t = fma(low, scale, fma(high, scale, V(-1.0f)));
  V p = V(kLogPoly[7]);
  for (int i = 6; i >= 0; --i) p = fma(p, t, V(kLogPoly[i]));
  const V tail = fma(t * t, fma(t, p, V(1.0f)), e * V(-kTwoLn2Low));
  return sqrt(fma(e, V(-kTwoLn2High), t * V(-2.0f)) + tail);
}

FASTGEN_INLINE void box_muller(Words radius, Words angle, Words* even, Words* odd) {
  using V = Vec<float>;
  const Words sign_bit = Words(0x80000000u);
  const V r = normal_radius(radius);
  const Words quarter = angle + Words(0x20000000u);
  const V s = fma(int_to_float(angle.shl<2>()), V(0x1p-32f), V(0x1p-31f));
  const V z = s * s;
  const V ps = fma(fma(V(kSinPoly[2]), z, V(kSinPoly[1])), z, V(kSinPoly[0]));
  const V sine = fma(s, V(kHalfPiHigh), s * fma(z, ps, V(kHalfPiLow)));
  const V pc = fma(fma(fma(V(kCosPoly[3]), z, V(kCosPoly[2])), z, V(kCosPoly[1])), z, V(kCosPoly[0]));
  const V cosine = fma(z, pc, V(1.0f));
  const Words swap = quarter.shl<1>();
  *even = bits(r * select_sign(swap, sine, cosine)) ^ ((quarter + Words(0x40000000u)) & sign_bit);
  *odd = bits(r * select_sign(swap, cosine, sine)) ^ (quarter & sign_bit);
}

// Normal values of the elements 4 * block ... 4 * block + kPhiloxElements - 1.
FASTGEN_INLINE void normal_vectors(PhiloxKey key, std::uint64_t block, float* out) {
  Words w[4];
  philox_vectors(key, block, w);
  box_muller(w[0], w[1], &w[0], &w[1]);
  box_muller(w[2], w[3], &w[2], &w[3]);
  transpose4(w);
  for (int j = 0; j < 4; ++j) store(out + j * Words::width, as_float(w[j]));
}

inline void normal_vectors(PhiloxKey key, std::uint64_t block, double* out) {
  Words w[4];
  philox_vectors(key, block, w);
  transpose4(w);
  std::uint32_t words[kPhiloxElements];
  for (int j = 0; j < 4; ++j) w[j].store(words + j * Words::width);
  for (int i = 0; i < kPhiloxElements; i += 2) fastgen::box_muller(words[i], words[i + 1], out + i, out + i + 1);
}

// A view on the noise of one tensor, for a thread that walks through its elements in order. Values are made a
// window at a time; windows end at multiples of kNoiseWindow, so where one ends depends on the element alone.
constexpr std::int64_t kNoiseWindow = 1024;

template <class T>
class NoiseWindow {
 public:
  // limit: one past the last element that will be asked for.
  NoiseWindow(PhiloxKey key, std::int64_t limit) : key_(key), limit_(limit) {}

  static std::int64_t window_end(std::int64_t index) { return (index | (kNoiseWindow - 1)) + 1; }

  // Noise of element `index` and of those after it, up to window_end(index).
  const T* at(std::int64_t index) {
    if (index < start_ || index >= end_) fill(index);
    return values_ + (index - start_);
  }

 private:
  void fill(std::int64_t index) {
    start_ = index & ~std::int64_t{3};
    end_ = std::min(window_end(index), limit_);
    for (std::int64_t i = start_; i < end_; i += kPhiloxElements) {
      normal_vectors(key_, static_cast<std::uint64_t>(i) / 4, values_ + (i - start_));
    }
  }

  PhiloxKey key_;
  std::int64_t limit_, start_ = 0, end_ = 0;
  alignas(64) T values_[kNoiseWindow + kPhiloxElements];
};

}  // namespace fastgen::FASTGEN_ISA_NS
