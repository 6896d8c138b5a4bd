// Kernels that are right, and the same ones with a defect planted: tests/cuda/test_emulator.py runs each under the
// emulator, alone or with a sanitizer, and expects the defect to be found.
//
// planted NAME SEED: runs one. Exit status 0 for the right result, 1 for a wrong one, 3 for a KernelError.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

namespace {

using fastgen::emulation::LaunchShape;

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

enum class Plant {
  kNone,
  kNoBarrier,
  kDivergentBarrier,
  kOtherBarrier,
  kMissingLanes,
  kLaneNotOfMask,
  kMixedOperations,
  kBeyondShared,
  kBeyondDynamic,
  kBeyondGlobal,
  kUnwrittenShared,
  kNoCopyWait,
  kMisalignedCopy,
  kNoWarpBarrier,
};

// out[i] = the sum of the block's 64 inputs, through warp shuffles and shared memory.
template <Plant kPlant>
__global__ void block_sum(const int* in, int* out) {
  FASTGEN_SHARED(int, partial, [kThreads / 32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = in[blockIdx.x * kThreads + threadIdx.x];
  if constexpr (kPlant == Plant::kMissingLanes) {
    if (lane < 16) sum += __shfl_xor_sync(kAll, sum, 8);
  }
  if constexpr (kPlant == Plant::kLaneNotOfMask) sum += __shfl_xor_sync(0xffffu, sum, 8);
  if constexpr (kPlant == Plant::kMixedOperations) lane < 16 ? __any_sync(kAll, 1) : __all_sync(kAll, 1);
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
  if (lane == 0 && kPlant != Plant::kUnwrittenShared) partial[warp] = sum;
  if (lane == 0 && kPlant == Plant::kBeyondShared) partial[warp + 1] = sum;
  if constexpr (kPlant == Plant::kDivergentBarrier) {
    if (warp == 0) __syncthreads();
  } else if constexpr (kPlant == Plant::kOtherBarrier) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (kPlant != Plant::kNoBarrier) {
    __syncthreads();
  }
  const int beyond = kPlant == Plant::kBeyondGlobal ? 1 : 0;
  out[blockIdx.x * kThreads + threadIdx.x + beyond] = partial[0] + partial[1];
}

// out = in with each group of four values reversed, copied through dynamic shared memory by cp.async.
template <Plant kPlant>
__global__ void reverse(const int* in, int* out) {
  FASTGEN_DYNAMIC_SHARED(int, buffer);
  const int first = 4 * static_cast<int>(threadIdx.x), misaligned = kPlant == Plant::kMisalignedCopy ? 1 : 0;
  fastgen::cp_async_16(buffer + first, in + first + misaligned, 16 - 4 * misaligned);
  fastgen::cp_async_commit();
  if constexpr (kPlant != Plant::kNoCopyWait) fastgen::cp_async_wait<0>();
  if constexpr (kPlant == Plant::kBeyondDynamic) buffer[first + 4] = 0;
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[first + i] = buffer[first + 3 - i];
}

// out[i] = in of the lane before, exchanged through shared memory within a warp.
template <Plant kPlant>
__global__ void rotate(const int* in, int* out) {
  FASTGEN_SHARED(int, values, [kThreads]);
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  values[threadIdx.x] = in[threadIdx.x];
  if constexpr (kPlant != Plant::kNoWarpBarrier) __syncwarp();
  out[threadIdx.x] = values[first + (lane + 31) % 32];
}

std::vector<int> numbers(int count) {
  std::vector<int> values(count);
  for (int i = 0; i < count; ++i) values[i] = 7 * i % 23 + 1;
  return values;
}

template <Plant kPlant>
bool run_block_sum(unsigned seed) {
  constexpr int kBlocks = 2;
  const std::vector<int> in = numbers(kBlocks * kThreads);
  std::vector<int> out(in.size(), -1), expected(in.size(), 0);
  for (std::size_t i = 0; i < in.size(); ++i) {
    for (int j = 0; j < kThreads; ++j) expected[i] += in[i / kThreads * kThreads + j];
  }
  launch(LaunchShape{kBlocks, kThreads, 0, seed}, [&] { block_sum<kPlant>(in.data(), out.data()); });
  return out == expected;
}

template <Plant kPlant>
bool run_reverse(unsigned seed) {
  const std::vector<int> in = numbers(4 * kThreads);
  std::vector<int> out(in.size(), -1), expected(in.size());
  for (std::size_t i = 0; i < in.size(); ++i) expected[i] = in[i / 4 * 4 + 3 - i % 4];
  launch(LaunchShape{1, kThreads, 16 * kThreads, seed}, [&] { reverse<kPlant>(in.data(), out.data()); });
  return out == expected;
}

template <Plant kPlant>
bool run_rotate(unsigned seed) {
  const std::vector<int> in = numbers(kThreads);
  std::vector<int> out(in.size(), -1), expected(in.size());
  for (std::size_t i = 0; i < in.size(); ++i) expected[i] = in[i / 32 * 32 + (i + 31) % 32];
  launch(LaunchShape{1, kThreads, 0, seed}, [&] { rotate<kPlant>(in.data(), out.data()); });
  return out == expected;
}

const std::map<std::string, bool (*)(unsigned)> kRuns{
    {"block_sum", run_block_sum<Plant::kNone>},
    {"reverse", run_reverse<Plant::kNone>},
    {"rotate", run_rotate<Plant::kNone>},
    {"no_barrier", run_block_sum<Plant::kNoBarrier>},
    {"divergent_barrier", run_block_sum<Plant::kDivergentBarrier>},
    {"other_barrier", run_block_sum<Plant::kOtherBarrier>},
    {"missing_lanes", run_block_sum<Plant::kMissingLanes>},
    {"lane_not_of_mask", run_block_sum<Plant::kLaneNotOfMask>},
    {"mixed_operations", run_block_sum<Plant::kMixedOperations>},
    {"beyond_shared", run_block_sum<Plant::kBeyondShared>},
    {"beyond_global", run_block_sum<Plant::kBeyondGlobal>},
    {"unwritten_shared", run_block_sum<Plant::kUnwrittenShared>},
    {"beyond_dynamic", run_reverse<Plant::kBeyondDynamic>},
    {"no_copy_wait", run_reverse<Plant::kNoCopyWait>},
    {"misaligned_copy", run_reverse<Plant::kMisalignedCopy>},
    {"no_warp_barrier", run_rotate<Plant::kNoWarpBarrier>},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || kRuns.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: planted NAME SEED\n");
    return 2;
  }
  try {
    return kRuns.at(argv[1])(static_cast<unsigned>(std::atoi(argv[2]))) ? 0 : 1;
  } catch (const fastgen::emulation::KernelError& error) {
    std::fprintf(stderr, "KernelError: %s\n", error.what());
    return 3;
  }
}
