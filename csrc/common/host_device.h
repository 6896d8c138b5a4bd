// FASTGEN_HD marks functions that host compilers and nvcc both compile.
#pragma once

#if defined(__CUDACC__)
#define FASTGEN_HD __host__ __device__
#else
#define FASTGEN_HD
#endif
