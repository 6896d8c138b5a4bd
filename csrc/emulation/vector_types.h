// CUDA's vector types, with its alignments.
#pragma once

#include <cstdint>

#define FASTGEN_VECTOR2(name, type, bytes)                                                                        \
  struct alignas(bytes) name {                                                                                    \
    type x, y;                                                                                                    \
  };                                                                                                              \
  inline name make_##name(type x, type y) { return {x, y}; }
#define FASTGEN_VECTOR4(name, type, bytes)                                                                        \
  struct alignas(bytes) name {                                                                                    \
    type x, y, z, w;                                                                                              \
  };                                                                                                              \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

FASTGEN_VECTOR2(short2, short, 4)
FASTGEN_VECTOR2(ushort2, unsigned short, 4)
FASTGEN_VECTOR2(int2, int, 8)
FASTGEN_VECTOR2(uint2, unsigned, 8)
FASTGEN_VECTOR2(float2, float, 8)
FASTGEN_VECTOR2(double2, double, 16)
FASTGEN_VECTOR2(longlong2, long long, 16)
FASTGEN_VECTOR2(ulonglong2, unsigned long long, 16)
FASTGEN_VECTOR4(ushort4, unsigned short, 8)
FASTGEN_VECTOR4(int4, int, 16)
FASTGEN_VECTOR4(uint4, unsigned, 16)
FASTGEN_VECTOR4(float4, float, 16)

#undef FASTGEN_VECTOR2
#undef FASTGEN_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
