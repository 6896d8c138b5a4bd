// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

// Whether the compiler knows AVX512-BF16.
#if defined(__x86_64__) &&                                                                                        \
    ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define FASTGEN_BF16 1
#else
#define FASTGEN_BF16 0
#endif

namespace fastgen {

// Each set includes those before it. kAvx512Bf16 runs the AVX-512 code paths, and bfloat16 products where an op
// has a use for them.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best set this machine has, or the one FASTGEN_CPU_ISA names. Throws std::runtime_error where the
// variable names an unknown set or one that the machine lacks.
Isa current_isa();

// The best set this machine has, whatever is forced.
Isa best_isa();

// Forces a set for the rest of the process (tests compare the code paths bit for bit).
void force_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace fastgen
