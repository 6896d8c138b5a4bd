// Keys of counter-based noise as the CPU kernels take them.
#pragma once

#include "../common/box_muller.h"
#include "../common/philox.h"
#include "common.h"

namespace fastgen {

// Reads an int64 tensor [seed, offset].
inline PhiloxKey read_key(const Tensor& key, const char* what) {
  check_shape(key, {2}, ScalarType::Long, what);
  const auto* words = data<const std::int64_t>(key);
  return {static_cast<std::uint64_t>(words[0]), static_cast<std::uint64_t>(words[key.stride(0)])};
}

}  // namespace fastgen
