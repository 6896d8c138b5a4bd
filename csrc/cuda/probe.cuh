// A copy in 128-bit pieces: the simplest kernel that can run at the speed of the memory.
#pragma once

#include <cstdint>

namespace fastgen {

// out[0, bytes) = in[0, bytes), the first `vectors` * 16 bytes in 128-bit pieces (0 where `in` is not 16-byte
// aligned). Any grid: each thread strides over the whole range.
__global__ void probe_kernel(const char* __restrict__ in, char* __restrict__ out, std::int64_t vectors,
                             std::int64_t bytes) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = first; i < vectors; i += step) {
    reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(in)[i];
  }
  for (std::int64_t i = vectors * static_cast<std::int64_t>(sizeof(uint4)) + first; i < bytes; i += step)
    out[i] = in[i];
}

}  // namespace fastgen
