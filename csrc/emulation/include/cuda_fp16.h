// Stands in for CUDA's own header: half by PyTorch's header-only type, with CUDA's names.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

using __half = torch::headeronly::Half;
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.x; }
inline __half __ushort_as_half(unsigned short bits) { return {bits, __half::from_bits()}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
