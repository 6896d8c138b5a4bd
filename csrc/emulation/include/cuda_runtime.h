// Stands in for CUDA's own header where g++ compiles a kernel's source for the host emulator.
//
// Left out on purpose: __activemask() (what it returns is a matter of scheduling), atomics on floating types, and
// a bare __shared__ (FASTGEN_SHARED of csrc/cuda/memory.cuh gives each block its own, poisoned, with its bounds
// checked).
#pragma once

#define FASTGEN_EMULATED 1

#include "../intrinsics.h"
#include "../synchronize.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "declare shared memory with FASTGEN_SHARED or FASTGEN_DYNAMIC_SHARED");

#define threadIdx (::fastgen::emulation::self().index)
#define blockIdx (::fastgen::emulation::self().block->index)
#define blockDim (::fastgen::emulation::self().block->size)
#define gridDim (::fastgen::emulation::self().block->grid)
constexpr int warpSize = 32;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
