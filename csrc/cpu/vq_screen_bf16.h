// The screening of vq_nearest.cpp with bfloat16 products, for CPUs with AVX512-BF16.
#pragma once

#include "vq_sets.h"

namespace fastgen {

// A vector of `size` elements as pairs of bfloat16: elements 2 i and 2 i + 1 in word i, the last of an odd number
// with zero.
using Bf16Pair = std::uint32_t;

inline std::int64_t bf16_pairs(std::int64_t size) { return (size + 1) / 2; }

// Whether the functions below may be called: the instruction set in use has them, and so had the compiler.
bool bf16_screening();

// Rounds each of `count` dense rows, and bounds from above what the rounding took: residual[i] >= |x_i - x^_i|.
void round_to_bf16(const float* rows, std::int64_t count, std::int64_t size, Bf16Pair* pairs, float* residual);

constexpr int kBf16TileRows = 6;

// minima (tiles * kBf16TileRows, sets): the least score of each set of codes, for rows of `pairs` pairs. panels:
// per panel pairs x 2 * width, start: 2 * width a panel.
void screen_bf16(const SetLayout& sets, const Bf16Pair* panels, const float* start, std::int64_t pairs,
                 const Bf16Pair* rows, std::int64_t tiles, float* minima);

}  // namespace fastgen
