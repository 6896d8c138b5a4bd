// Normal values and words of elements [begin, end), begin a multiple of 4, for one instruction set.

#include "philox_simd.h"

namespace fastgen::FASTGEN_ISA_NS {

template <class S>
void fill_normal(PhiloxKey key, S* out, std::int64_t begin, std::int64_t end) {
  using T = acc_t<S>;
  using V = Vec<T>;
  std::int64_t i = begin;
  if constexpr (std::is_same_v<S, T>) {
    for (; i + kNormalElements <= end; i += kNormalElements) {
      normal_vectors(key, static_cast<std::uint64_t>(i) / 4, out + i);
    }
  }
  alignas(64) T values[kNormalElements];
  for (; i < end; i += kNormalElements) {
    normal_vectors(key, static_cast<std::uint64_t>(i) / 4, values);
    transform(std::min<std::int64_t>(kNormalElements, end - i), out + i, [](V a) { return a; }, values);
  }
}

inline void fill_words(PhiloxKey key, std::int64_t* out, std::int64_t begin, std::int64_t end) {
  Words w[1][4];
  std::uint32_t words[kPhiloxElements];
  for (std::int64_t i = begin; i < end; i += kPhiloxElements) {
    philox_vectors(key, static_cast<std::uint64_t>(i) / 4, w);
    transpose4(w[0]);
    for (int j = 0; j < 4; ++j) w[0][j].store(words + j * Words::width);
    const std::int64_t count = std::min<std::int64_t>(kPhiloxElements, end - i);
    for (std::int64_t j = 0; j < count; ++j) out[i + j] = words[j];
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
