// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

namespace fastgen {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best set this machine has, or the one FASTGEN_CPU_ISA names. Throws std::runtime_error where the
// variable names an unknown set or one that the machine lacks.
Isa current_isa();

// The best set this machine has, whatever is forced.
Isa best_isa();

// Forces a set for the rest of the process (tests compare the code paths bit for bit).
void force_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace fastgen
