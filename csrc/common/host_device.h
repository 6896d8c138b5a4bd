// FASTGEN_HD marks functions, FASTGEN_HD_TABLE constant arrays that host compilers and nvcc both compile.
#pragma once

#if defined(__CUDACC__)
#define FASTGEN_HD __host__ __device__
#define FASTGEN_HD_TABLE __device__
#else
#define FASTGEN_HD
#define FASTGEN_HD_TABLE
#endif
