// The Box-Muller transform of two 32-bit words, scalar, and the constants its vector version shares.
//
// With u = (radius + 1/2) / 2^32 and v = (angle + 1/2) / 2^32, exact real numbers:
//     even = sqrt(-2 ln u) cos(2 pi v),  odd = sqrt(-2 ln u) sin(2 pi v).
// float: both reductions round once, relative to what they return, so that the error is that of a few float
// operations over all 2^64 pairs, at u near 1 and at v near the axes too. No pair gives NaN, infinity or zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastgen {

// -2 ln(1 - t) = t (2 + t P(t)) for t in [0, 1/2]: P, constant term first. Relative error 2.4e-8.
constexpr float kLogPoly[8] = {0.9999904632568359f,  0.6672642230987549f,   0.48736515641212463f,
                               0.5273823738098145f,  -0.36190664768218994f, 2.4174327850341797f,
                               -3.2791852951049805f, 2.8290984630584717f};
constexpr float kTwoLn2 = 1.3862943611198906f;
// sin(s pi/2) = s (pi/2 + s^2 S(s^2)) and cos(s pi/2) = 1 + s^2 C(s^2) for |s| <= 1/2. Relative errors 4e-9,
// 5e-10.
constexpr float kHalfPiHigh = 1.5707963705062866f, kHalfPiLow = -4.371139e-8f;
constexpr float kSinPoly[3] = {-0.6459636092185974f, 0.07968108355998993f, -0.004603731911629438f};
constexpr float kCosPoly[4] = {-1.2337005138397217f, 0.25366854667663574f, -0.020855596289038658f,
                               0.0008944863802753389f};

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

// Of positive numbers far from the ends of the range.
FASTGEN_HD inline float normal_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  // sqrtf spends half of its instructions on numbers that do not come here. A Newton step makes up for the
  // estimate.
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
#else
  return sqrtf(x);
#endif
}

// sqrt(-2 ln u).
FASTGEN_HD inline float normal_radius(std::uint32_t word) {
  // y is u where u < 1/2 and 1 - u elsewhere, rounded once, relative to itself, even where u is nearly 1.
  const bool above = (word & 0x80000000u) != 0;
  const float y = fused(static_cast<float>(static_cast<std::int32_t>(above ? ~word : word)), 0x1p-32f, 0x1p-33f);
  // u = 2^e (1 - t) with t in (0, 1/2] and e <= 0: the terms of -2 ln u have one sign, so nothing cancels.
  const std::uint32_t bits = float_to_bits(y);
  const float t = above ? y : 1.0f - bits_to_float((bits & 0x007fffffu) | 0x3f000000u);
  const float e = above ? 0.0f : static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 126);
  // Device code sees the tables' values, but not the tables.
  constexpr float log_poly[8] = {kLogPoly[0], kLogPoly[1], kLogPoly[2], kLogPoly[3],
                                 kLogPoly[4], kLogPoly[5], kLogPoly[6], kLogPoly[7]};
  float p = log_poly[7];
  for (int i = 6; i >= 0; --i) p = fused(p, t, log_poly[i]);
  return normal_sqrt(fused(e, -kTwoLn2, t * fused(p, t, 2.0f)));
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
