// Element types, and vectors of elements in 16-byte accesses.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/accumulate.h"
#include "ptx.cuh"

namespace fastgen {

// Elements that a thread loads and stores at once: 16 bytes, and at least the four values of a Philox block.
template <class S>
constexpr int kVector = sizeof(S) == 2 ? 8 : 4;

// The same in rows that need not lie in whole vectors.
template <class S, bool kVectors>
constexpr int kRowVector = kVectors ? kVector<S> : 4;

// Elements as they lie in memory, in whole registers: nvcc takes structs of 16-bit values apart and moves them one
// by one.
template <class S, int kCount>
struct alignas(kCount * sizeof(S) < 16 ? kCount * sizeof(S) : 16) Vector {
  std::uint32_t words[kCount * sizeof(S) / 4];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// One 32-bit word of 16-bit elements.
__device__ __forceinline__ float2 widen_pair(std::uint32_t word, const __nv_bfloat16*) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 widen_pair(std::uint32_t word, const __half*) {
  __half2 pair;
  memcpy(&pair, &word, sizeof(word));
  return __half22float2(pair);
}
__device__ __forceinline__ std::uint32_t narrow_pair(float2 values, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(values);
  std::uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ __forceinline__ std::uint32_t narrow_pair(float2 values, const __half*) {
  const __half2 pair = __float22half2_rn(values);
  std::uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

template <class S, int kCount>
__device__ __forceinline__ void widen(const Vector<S, kCount>& from, acc_t<S> (&to)[kCount]) {
  if constexpr (sizeof(S) == 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 pair = widen_pair(from.words[i / 2], static_cast<const S*>(nullptr));
      to[i] = pair.x;
      to[i + 1] = pair.y;
    }
  } else {
    memcpy(to, from.words, sizeof(to));
  }
}

template <class S, int kCount>
__device__ __forceinline__ Vector<S, kCount> narrow(const acc_t<S> (&from)[kCount]) {
  Vector<S, kCount> vector;
  if constexpr (sizeof(S) == 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      vector.words[i / 2] = narrow_pair({from[i], from[i + 1]}, static_cast<const S*>(nullptr));
    }
  } else {
    memcpy(vector.words, from, sizeof(from));
  }
  return vector;
}

// Elements [0, kCount) from `row` on: 16 bytes an access, or where not kVectors one access for each that is in
// [first, last); the others are zero.
template <bool kVectors, int kCount, class S>
__device__ __forceinline__ Vector<S, kCount> read_vector(const S* row, std::int64_t first, std::int64_t last) {
  if constexpr (kVectors) {
    Vector<S, kCount> vector;
    const auto* from = reinterpret_cast<const uint4*>(row);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(vector) / 16); ++i) {
      const uint4 quad = __ldg(from + i);
      memcpy(&vector.words[4 * i], &quad, 16);
    }
    return vector;
  } else {
    acc_t<S> values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = i >= first && i < last ? widen(__ldg(row + i)) : acc_t<S>(0);
    }
    return narrow<S>(values);
  }
}

template <bool kVectors, int kCount, class S>
__device__ __forceinline__ void write_vector(const acc_t<S> (&from)[kCount], S* row, std::int64_t first,
                                             std::int64_t last) {
  if constexpr (kVectors) {
    const Vector<S, kCount> vector = narrow<S>(from);
    auto* to = reinterpret_cast<uint4*>(row);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(vector) / 16); ++i) {
      const std::uint32_t* w = &vector.words[4 * i];
      store_quad(to + i, make_uint4(w[0], w[1], w[2], w[3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= first && i < last) narrow(from[i], &row[i]);
    }
  }
}

// Whether whole vectors can be accessed at p + i * stride for every i.
template <class S>
bool vectors_at(const S* p, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride % kVector<S> == 0;
}

}  // namespace fastgen
