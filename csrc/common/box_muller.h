// The Box-Muller transform of two 32-bit words, scalar, and the constants its vector version shares.
//
// With u = (radius + 1/2) / 2^32 and v = (angle + 1/2) / 2^32, exact real numbers:
//     even = sqrt(-2 ln u) cos(2 pi v),  odd = sqrt(-2 ln u) sin(2 pi v).
// float: both reductions are exact or correctly rounded, so that the error is that of a few float operations over
// all 2^64 pairs, at u near 1 and at v near the axes too. No pair gives NaN, infinity or zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastgen {

// -2 ln(1 + t) = -2 t + t^2 (1 + t P(t)) for |t| <= 1/3: P, constant term first. Relative error 5e-9.
constexpr float kLogPoly[8] = {-0.6666643023490906f, 0.4999961256980896f,   -0.4002085328102112f,
                               0.33360394835472107f, -0.28011465072631836f, 0.24374890327453613f,
                               -0.2796921730041504f, 0.2576046586036682f};
// 2 ln 2 in two parts; multiples of the first by up to 64 are exact.
constexpr float kTwoLn2High = 1.38671875f, kTwoLn2Low = -4.243889e-4f;
// sin(s pi/2) = s (pi/2 + s^2 S(s^2)) and cos(s pi/2) = 1 + s^2 C(s^2) for |s| <= 1/2. Relative errors 4e-9,
// 5e-10.
constexpr float kHalfPiHigh = 1.5707963705062866f, kHalfPiLow = -4.371139e-8f;
constexpr float kSinPoly[3] = {-0.6459636092185974f, 0.07968108355998993f, -0.004603731911629438f};
constexpr float kCosPoly[4] = {-1.2337005138397217f, 0.25366854667663574f, -0.020855596289038658f,
                               0.0008944863802753389f};
// Bits of 2/3: the mantissa is taken in [2/3, 4/3).
constexpr std::uint32_t kTwoThirdsBits = 0x3f2aaaabu, kOneBits = 0x3f800000u;

FASTGEN_HD inline float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTGEN_HD inline float bits_to_float(std::uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof(f));
  return f;
}

FASTGEN_HD inline std::uint32_t float_to_bits(float f) {
  std::uint32_t u;
  memcpy(&u, &f, sizeof(u));
  return u;
}

// sqrt(-2 ln u).
FASTGEN_HD inline float normal_radius(std::uint32_t word) {
  // u = high + low exactly. With u = 2^e (1 + t), t is rounded once, relative to itself, even where u is nearly 1.
  const float high = static_cast<float>(word >> 16) * 0x1p-16f;
  const float low = fused(static_cast<float>(word & 0xffffu), 0x1p-32f, 0x1p-33f);
  const std::uint32_t exponent = (float_to_bits(high + low) + (kOneBits - kTwoThirdsBits)) >> 23;
  const float scale = bits_to_float((254u - exponent) << 23);
  const float e = static_cast<float>(static_cast<std::int32_t>(exponent) - 127);
  const float t = fused(low, scale, fused(high, scale, -1.0f));
  float p = kLogPoly[7];
  for (int i = 6; i >= 0; --i) p = fused(p, t, kLogPoly[i]);
  const float tail = fused(t * t, fused(t, p, 1.0f), -e * kTwoLn2Low);
  return sqrtf(fused(e, -kTwoLn2High, -2.0f * t) + tail);
}

FASTGEN_HD inline void box_muller(std::uint32_t radius, std::uint32_t angle, float* even, float* odd) {
  const float r = normal_radius(radius);
  // The angle is a whole number of quarter turns, the top bits, plus s of one: exact in integers.
  const std::uint32_t quarter = angle + 0x20000000u;
  const float s = fused(static_cast<float>(static_cast<std::int32_t>(angle << 2)), 0x1p-32f, 0x1p-31f);
  const float z = s * s;
  const float ps = fused(fused(kSinPoly[2], z, kSinPoly[1]), z, kSinPoly[0]);
  const float sine = fused(s, kHalfPiHigh, s * fused(z, ps, kHalfPiLow));
  const float pc = fused(fused(fused(kCosPoly[3], z, kCosPoly[2]), z, kCosPoly[1]), z, kCosPoly[0]);
  const float cosine = fused(z, pc, 1.0f);
  const bool swap = (quarter & 0x40000000u) != 0;
  const float x = r * (swap ? sine : cosine), y = r * (swap ? cosine : sine);
  *even = ((quarter + 0x40000000u) & 0x80000000u) != 0 ? -x : x;
  *odd = (quarter & 0x80000000u) != 0 ? -y : y;
}

FASTGEN_HD inline void box_muller(std::uint32_t radius, std::uint32_t angle, double* even, double* odd) {
  const double r = std::sqrt(-2.0 * std::log((radius + 0.5) * 0x1p-32));
  const std::uint32_t quarter = angle + 0x20000000u;
  const double x = ((static_cast<std::int32_t>(angle << 2) >> 2) + 0.5) * (1.5707963267948966 * 0x1p-30);
  const double sine = std::sin(x), cosine = std::cos(x);
  const bool swap = (quarter & 0x40000000u) != 0;
  const double a = r * (swap ? sine : cosine), b = r * (swap ? cosine : sine);
  *even = ((quarter + 0x40000000u) & 0x80000000u) != 0 ? -a : a;
  *odd = (quarter & 0x80000000u) != 0 ? -b : b;
}

}  // namespace fastgen
