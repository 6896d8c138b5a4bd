// Shared memory, declared so that the host emulator can check it too, and 16-byte accesses to global memory.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

// FASTGEN_SHARED(type, name, [4][32]): a variable of the block. FASTGEN_DYNAMIC_SHARED(type, name): a pointer to
// the memory whose size the launch gives.
#if defined(FASTGEN_EMULATED)
#define FASTGEN_SHARED(type, name, ...)                                                                           \
  using name##_shared_type = type __VA_ARGS__;                                                                    \
  static const char name##_shared_key = 0;                                                                        \
  auto& name = *static_cast<name##_shared_type*>(                                                                 \
      ::fastgen::emulation::self().block->shared(&name##_shared_key, sizeof(name##_shared_type)))
#define FASTGEN_DYNAMIC_SHARED(type, name)                                                                        \
  type* const name = static_cast<type*>(::fastgen::emulation::self().block->dynamic_shared.data())
#else
#define FASTGEN_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define FASTGEN_DYNAMIC_SHARED(type, name)                                                                        \
  extern __shared__ __align__(1024) unsigned char fastgen_dynamic_shared[];                                       \
  type* const name = reinterpret_cast<type*>(fastgen_dynamic_shared)
#endif
