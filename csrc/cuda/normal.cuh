// Standard normal values of a key.
#pragma once

#include "noise.cuh"
#include "rows.cuh"

namespace fastgen {

constexpr int kNormalThreads = 256, kNormalVectors = 4;

// out[0, count), 16-byte aligned: every thread makes kNormalVectors vectors, the last of which may be cut short.
template <class S>
__global__ void __launch_bounds__(kNormalThreads)
    normal_kernel(const std::int64_t* __restrict__ key, std::int64_t count, S* __restrict__ out) {
  constexpr int kCount = kVector<S>;
  const PhiloxKey k = load_key(key);
  std::int64_t i =
      (static_cast<std::int64_t>(blockIdx.x) * kNormalVectors * kNormalThreads + threadIdx.x) * kCount;
#pragma unroll
  for (int v = 0; v < kNormalVectors; ++v, i += kNormalThreads * kCount) {
    if (i >= count) return;
    acc_t<S> values[kCount];
    make_noise<S>(k, static_cast<std::uint64_t>(i) / 4, values);
    if (i + kCount <= count) {
      write_vector<true>(values, out + i, 0, kCount);
    } else {
      write_vector<false>(values, out + i, 0, count - i);
    }
  }
}

template <class S, class Run>
void normal_values(const std::int64_t* key, std::int64_t count, S* out, Run& run) {
  constexpr std::int64_t kBlock = std::int64_t{kNormalVectors} * kNormalThreads * kVector<S>;
  if (count == 0) return;
  run(normal_kernel<S>, grid_of((count + kBlock - 1) / kBlock), kNormalThreads, 0, key, count, out);
}

}  // namespace fastgen
