// Normal values of a key of counter-based noise, made in registers.
#pragma once

#include "../common/box_muller.h"
#include "../common/philox.h"
#include "element.cuh"
#include "ptx.cuh"

namespace fastgen {

// The key lies in device memory, so that a CUDA graph replays with whatever it holds then.
__device__ __forceinline__ PhiloxKey load_key(const std::int64_t* key) {
  return {static_cast<std::uint64_t>(key[0]), static_cast<std::uint64_t>(key[1])};
}

// Box and Muller for results of 11 bits or fewer, on the special-function unit: 12 instructions for two values,
// where the transform of box_muller.h takes some 60. Absolute errors stay below 1e-5, but where u rounds to nearly
// 1: there the radius, less than 0.02, errs by up to 5e-4.
__device__ __forceinline__ void box_muller_fast(std::uint32_t radius, std::uint32_t angle, float* even,
                                                float* odd) {
  const float u = fmaf(static_cast<float>(radius), 0x1p-32f, 0x1p-33f);
  // lg2 errs by 2^-22 near u = 1, to either side of zero.
  const float r = sqrt_approx(fabsf(lg2_approx(u) * -1.3862943611198906f));
  constexpr float kTurn = 6.283185307179586f;
  const float x = fmaf(static_cast<float>(static_cast<std::int32_t>(angle)), kTurn * 0x1p-32f, kTurn * 0x1p-33f);
  *even = r * cos_approx(x);
  *odd = r * sin_approx(x);
}

// How values of element type S are made. Every kernel that makes noise of one dtype makes the same.
template <class S>
__device__ __forceinline__ void noise_pair(std::uint32_t radius, std::uint32_t angle, acc_t<S>* even,
                                           acc_t<S>* odd) {
  if constexpr (sizeof(S) == 2) {
    box_muller_fast(radius, angle, even, odd);
  } else {
    box_muller(radius, angle, even, odd);
  }
}

// The values of `kCount` elements from element 4 * block on.
template <class S, int kCount>
__device__ __forceinline__ void make_noise(PhiloxKey key, std::uint64_t block, acc_t<S> (&to)[kCount]) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const PhiloxWords words = philox_block(key, block + i / 4);
    noise_pair<S>(words.w[0], words.w[1], &to[i], &to[i + 1]);
    noise_pair<S>(words.w[2], words.w[3], &to[i + 2], &to[i + 3]);
  }
}

}  // namespace fastgen
