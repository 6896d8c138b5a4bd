// Compiles FASTGEN_ISA_FILE once per instruction set, each in its own namespace
// (fastgen::portable, fastgen::avx2, fastgen::avx512), inside one object file.
//
// Usage, in csrc/cpu/<op>.cpp, after every other include:
//     #define FASTGEN_ISA_FILE "<op>_kernel.h"
//     #include "foreach_isa.h"
// and then FASTGEN_DISPATCH_ISA(function, args...) calls the copy that fits the machine.
//
// No include guard: the file is meant to be read again by every op.

#define FASTGEN_ISA_NS portable
#include "simd.h"
#include "vmath.h"
#include FASTGEN_ISA_FILE
#undef FASTGEN_ISA_NS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTGEN_ISA_NS avx2
#define FASTGEN_SIMD_AVX2 1
#include "simd.h"
#include "vmath.h"
#include FASTGEN_ISA_FILE
#undef FASTGEN_SIMD_AVX2
#undef FASTGEN_ISA_NS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))),         \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define FASTGEN_ISA_NS avx512
#define FASTGEN_SIMD_AVX512 1
#include "simd.h"
#include "vmath.h"
#include FASTGEN_ISA_FILE
#undef FASTGEN_SIMD_AVX512
#undef FASTGEN_ISA_NS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define FASTGEN_DISPATCH_ISA(FUNCTION, ...)                                                                       \
  (::fastgen::current_isa() >= ::fastgen::Isa::kAvx512 ? ::fastgen::avx512::FUNCTION(__VA_ARGS__)                 \
   : ::fastgen::current_isa() == ::fastgen::Isa::kAvx2 ? ::fastgen::avx2::FUNCTION(__VA_ARGS__)                   \
                                                       : ::fastgen::portable::FUNCTION(__VA_ARGS__))

#else

#define FASTGEN_DISPATCH_ISA(FUNCTION, ...) ::fastgen::portable::FUNCTION(__VA_ARGS__)

#endif
