// The random words of a key of counter-based noise, one counter (four words) a thread.
#pragma once

#include "../common/philox.h"

namespace fastgen {

// out[0, count) = the words of `key`, [seed, offset] in device memory; out is 16-byte aligned. One thread for
// every four words, the last of which may be fewer.
__global__ void philox_words_kernel(const std::int64_t* __restrict__ key, std::int64_t count,
                                    std::int64_t* __restrict__ out) {
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t first = 4 * block;
  if (first >= count) return;
  const PhiloxKey k{static_cast<std::uint64_t>(key[0]), static_cast<std::uint64_t>(key[1])};
  const PhiloxWords words = philox_block(k, static_cast<std::uint64_t>(block));
  if (first + 4 <= count) {
    auto* pairs = reinterpret_cast<longlong2*>(out + first);
    pairs[0] = make_longlong2(words.w[0], words.w[1]);
    pairs[1] = make_longlong2(words.w[2], words.w[3]);
    return;
  }
  for (int i = 0; first + i < count; ++i) out[first + i] = words.w[i];
}

}  // namespace fastgen
