// Philox words and normal values on vectors, for one instruction set. Included by kernel headers, so it is read
// once per instruction set, and has no include guard; philox.h comes before.
//
// Arithmetic is that of csrc/common, lane by lane, with fused multiply-adds where the instruction set has them.

namespace fastgen::FASTGEN_ISA_NS {

// Elements of a block of philox_vectors: 4 of each of Words::width counters.
constexpr int kPhiloxElements = 4 * Words::width;

// Lane i = 4 * g + k (k < 4) works on counter (Words::width / 4) * k + g, so that transpose4 leaves consecutive
// elements in each vector and nothing crosses 128-bit lanes. These are the counters of the even lanes; an odd
// lane's is Words::width / 4 more than that of the lane before it.
#if defined(FASTGEN_SIMD_AVX512)
alignas(64) constexpr std::uint64_t kEvenCounters[8] = {0, 8, 1, 9, 2, 10, 3, 11};
#else
alignas(64) constexpr std::uint64_t kEvenCounters[4] = {0, 4, 1, 5};
#endif

// Blocks of kPhiloxElements that the noise is made in: as many as the registers hold, since the operations on one
// wait for each other.
#if defined(FASTGEN_SIMD_AVX512)
constexpr int kBlocksInStep = 2;
#else
constexpr int kBlocksInStep = 1;
#endif

template <int N>
FASTGEN_INLINE void philox_rounds(PhiloxKey key, WideWords (&c)[N][4]) {
  // Only the low halves count: mul_low ignores the high ones, which hold leftovers.
  std::uint32_t key0 = static_cast<std::uint32_t>(key.seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideWords k0 = WideWords(std::uint64_t{key0}), k1 = WideWords(std::uint64_t{key1});
    WideWords p0[N], p1[N];
    for (int n = 0; n < N; ++n) p0[n] = mul_low(c[n][0], WideWords(std::uint64_t{kPhiloxMultiplier0}));
    for (int n = 0; n < N; ++n) p1[n] = mul_low(c[n][2], WideWords(std::uint64_t{kPhiloxMultiplier1}));
    for (int n = 0; n < N; ++n) {
      c[n][0] = xor3(p1[n].high(), c[n][1], k0);
      c[n][1] = p1[n];
      c[n][2] = xor3(p0[n].high(), c[n][3], k1);
      c[n][3] = p0[n];
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// Word j of the counters block, block + 1, ... in w[.][j], in the lane order above.
template <int N>
FASTGEN_INLINE void philox_vectors(PhiloxKey key, std::uint64_t block, Words (&w)[N][4]) {
  const WideWords zero = WideWords(std::uint64_t{0});
  WideWords c[2 * N][4];
  for (int n = 0; n < 2 * N; ++n) {
    const std::uint64_t first = key.offset + block + (n / 2 * 4 + n % 2) * (Words::width / 4);
    const WideWords counters = WideWords::load(kEvenCounters) + WideWords(first);
    c[n][0] = counters;
    c[n][1] = counters.high();
    c[n][2] = c[n][3] = zero;
  }
  philox_rounds(key, c);
  for (int n = 0; n < N; ++n) {
    for (int j = 0; j < 4; ++j) w[n][j] = interleave_low(c[2 * n][j], c[2 * n + 1][j]);
  }
}

// sqrt(-2 ln u).
template <int N>
FASTGEN_INLINE void normal_radii(const Words (&word)[N], Vec<float> (&radius)[N]) {
  using V = Vec<float>;
  V t[N], e[N], p[N];
  for (int n = 0; n < N; ++n) {
    const V y = fma(int_to_float(word[n] ^ word[n].sign()), V(0x1p-32f), V(0x1p-33f));
    t[n] = select_sign(word[n], y, V(1.0f) - fraction(y));
    e[n] = select_sign(word[n], V(0.0f), exponent(y) + V(1.0f));
    p[n] = V(kLogPoly[7]);
  }
#pragma GCC unroll 8
  for (int i = 6; i >= 0; --i) {
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], t[n], V(kLogPoly[i]));
  }
  for (int n = 0; n < N; ++n) {
    radius[n] = sqrt(fma(e[n], V(-kTwoLn2), t[n] * fma(p[n], t[n], V(2.0f))));
  }
}

// N pairs of words, which become pairs of normal values.
template <int N>
FASTGEN_INLINE void box_muller(Words (&radius)[N], Words (&angle)[N]) {
  using V = Vec<float>;
  V r[N], s[N], z[N], sine[N], cosine[N];
  normal_radii(radius, r);
  for (int n = 0; n < N; ++n) {
    s[n] = fma(int_to_float(angle[n].template shl<2>()), V(0x1p-32f), V(0x1p-31f));
    z[n] = s[n] * s[n];
    sine[n] = fma(fma(V(kSinPoly[2]), z[n], V(kSinPoly[1])), z[n], V(kSinPoly[0]));
    cosine[n] = fma(fma(V(kCosPoly[3]), z[n], V(kCosPoly[2])), z[n], V(kCosPoly[1]));
  }
  for (int n = 0; n < N; ++n) {
    sine[n] = fma(s[n], V(kHalfPiHigh), s[n] * fma(z[n], sine[n], V(kHalfPiLow)));
    cosine[n] = fma(z[n], fma(cosine[n], z[n], V(kCosPoly[0])), V(1.0f));
  }
  for (int n = 0; n < N; ++n) {
    const Words quarter = angle[n] + Words(0x20000000u), swap = quarter.shl<1>();
    const V even = r[n] * select_sign(swap, sine[n], cosine[n]);
    const V odd = r[n] * select_sign(swap, cosine[n], sine[n]);
    radius[n] = bits(flip_sign(even, quarter + Words(0x40000000u)));
    angle[n] = bits(flip_sign(odd, quarter));
  }
}

// Elements that one call of normal_vectors makes.
constexpr int kNormalElements = kBlocksInStep * kPhiloxElements;

// Normal values of the elements 4 * block ... 4 * block + kNormalElements - 1.
FASTGEN_INLINE void normal_vectors(PhiloxKey key, std::uint64_t block, float* out) {
  Words w[kBlocksInStep][4], radius[2 * kBlocksInStep], angle[2 * kBlocksInStep];
  philox_vectors(key, block, w);
  for (int n = 0; n < 2 * kBlocksInStep; ++n) {
    radius[n] = w[n / 2][n % 2 * 2];
    angle[n] = w[n / 2][n % 2 * 2 + 1];
  }
  box_muller(radius, angle);
  for (int n = 0; n < kBlocksInStep; ++n) {
    Words values[4] = {radius[2 * n], angle[2 * n], radius[2 * n + 1], angle[2 * n + 1]};
    transpose4(values);
    for (int j = 0; j < 4; ++j) store(out + n * kPhiloxElements + j * Words::width, as_float(values[j]));
  }
}

inline void normal_vectors(PhiloxKey key, std::uint64_t block, double* out) {
  Words w[kBlocksInStep][4];
  philox_vectors(key, block, w);
  std::uint32_t words[kNormalElements];
  for (int n = 0; n < kBlocksInStep; ++n) {
    transpose4(w[n]);
    for (int j = 0; j < 4; ++j) w[n][j].store(words + n * kPhiloxElements + j * Words::width);
  }
  for (int i = 0; i < kNormalElements; i += 2) fastgen::box_muller(words[i], words[i + 1], out + i, out + i + 1);
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
    for (std::int64_t i = start_; i < end_; i += kNormalElements) {
      normal_vectors(key_, static_cast<std::uint64_t>(i) / 4, values_ + (i - start_));
    }
  }

  PhiloxKey key_;
  std::int64_t limit_, start_ = 0, end_ = 0;
  alignas(64) T values_[kNoiseWindow + kNormalElements];
};

}  // namespace fastgen::FASTGEN_ISA_NS
