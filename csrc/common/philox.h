// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), scalar.
// The stream is defined in fastgen/random.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastgen {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  std::uint32_t w[4];
};

// What the noise of one tensor depends on.
struct PhiloxKey {
  std::uint64_t seed, offset;
};

FASTGEN_HD inline std::uint64_t wide_product(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  // From C++ nvcc makes a product of 64-bit numbers, one instruction more.
  std::uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<std::uint64_t>(a) * b;
#endif
}

FASTGEN_HD inline PhiloxWords philox4x32(PhiloxWords counter, std::uint32_t key0, std::uint32_t key1) {
  PhiloxWords c = counter;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t p0 = wide_product(kPhiloxMultiplier0, c.w[0]);
    const std::uint64_t p1 = wide_product(kPhiloxMultiplier1, c.w[2]);
    c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.w[1] ^ key0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.w[3] ^ key1, static_cast<std::uint32_t>(p0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

// The words of elements 4 * block ... 4 * block + 3.
FASTGEN_HD inline PhiloxWords philox_block(PhiloxKey key, std::uint64_t block) {
  const std::uint64_t counter = key.offset + block;
  return philox4x32({{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0}},
                    static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32));
}

}  // namespace fastgen
