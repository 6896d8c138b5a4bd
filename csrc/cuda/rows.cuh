// Rows cut into pieces, one for a team of threads: a block, or for short rows a few lanes of a warp. How rows are
// cut depends on their size alone, so sums do not depend on the device or on how many rows there are.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "element.cuh"
#include "memory.cuh"

namespace fastgen {

constexpr std::int64_t kPiece = 8192;
constexpr int kBlockThreads = 256;
// Short rows: of at most kShortRow elements, kShortTeam lanes each.
constexpr std::int64_t kShortRow = 256;
constexpr int kShortTeam = 8;

// The grid of a number of blocks.
inline dim3 grid_of(std::int64_t blocks) {
  if (blocks > std::numeric_limits<std::int32_t>::max())
    throw std::length_error("too many elements for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

struct RowGrid {
  std::int64_t rows, size, pieces;
  bool short_rows;
  int threads;

  RowGrid(std::int64_t rows, std::int64_t size)
      : rows(rows),
        size(size),
        pieces(size <= kPiece ? 1 : (size + kPiece - 1) / kPiece),
        short_rows(size <= kShortRow),
        threads(short_rows || size > 2048 ? kBlockThreads
                : size > 1024             ? 128
                                          : 64) {}

  dim3 blocks() const {
    constexpr std::int64_t kTeams = kBlockThreads / kShortTeam;
    return grid_of(short_rows ? (rows + kTeams - 1) / kTeams : rows * pieces);
  }
};

// A thread's place: its row, the elements [first, last) of its team's piece, and its rank in the team. A team
// without a row has no elements.
template <bool kShortRows>
struct Team {
  std::int64_t row, first, last;
  int rank, threads;

  __device__ __forceinline__ Team(std::int64_t rows, std::int64_t size, unsigned pieces) {
    if constexpr (kShortRows) {
      row = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kShortTeam) + threadIdx.x / kShortTeam;
      first = 0;
      last = row < rows ? size : 0;
      rank = threadIdx.x % kShortTeam;
      threads = kShortTeam;
    } else {
      row = blockIdx.x / pieces;
      first = blockIdx.x % pieces * kPiece;
      last = min(size, first + kPiece);
      rank = threadIdx.x;
      threads = blockDim.x;
    }
  }

  // The sum of the team's values, in its thread of rank 0. Every thread of the block must call it, once a kernel.
  template <class T>
  __device__ __forceinline__ T sum(T value) const {
    constexpr int kWidth = kShortRows ? kShortTeam : 32;
#pragma unroll
    for (int bits = kWidth / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
    if constexpr (!kShortRows) {
      FASTGEN_SHARED(T, of_warp, [kBlockThreads / 32]);
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int i = 1; i < threads / 32; ++i) value += of_warp[i];
      }
    }
    return value;
  }
};

// Calls use(j, in) for the elements [j, j + kCount) of a row and kInputs vectors of them, over the team's piece.
// The next vectors are on their way while use() computes. Where rows do not lie in whole vectors, kVectors is
// false: kCount is 4, j is a multiple of 4 in the whole tensor, and elements outside the piece are zero.
template <class S, bool kVectors, int kInputs, bool kShortRows, class Use>
__device__ __forceinline__ void for_each_vector(const Team<kShortRows>& team, std::int64_t size,
                                                const S* const* inputs, Use use) {
  constexpr int kCount = kRowVector<S, kVectors>;
  const int shift = kVectors ? 0 : static_cast<int>((team.row * size + team.first) % 4);
  const int step = team.threads * kCount;
  std::int64_t j = team.first - shift + team.rank * kCount;
  if (j >= team.last) return;
  const S* at[kInputs];
  Vector<S, kCount> in[kInputs], next[kInputs];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    at[k] = inputs[k] + j;
    next[k] = read_vector<kVectors, kCount>(at[k], team.first - j, team.last - j);
  }
#pragma unroll 1
  for (; j < team.last; j += step) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      in[k] = next[k];
      at[k] += step;
      if (j + step < team.last) {
        next[k] = read_vector<kVectors, kCount>(at[k], team.first - j - step, team.last - j - step);
      }
    }
    use(j, in);
  }
}

// out[row] = the sum of its pieces, in order; a warp for each row.
template <class T>
__global__ void sum_pieces_kernel(const T* __restrict__ pieces, std::int64_t count, std::int64_t rows,
                                  T* __restrict__ out) {
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (std::int64_t i = lane; row < rows && i < count; i += 32) sum += pieces[row * count + i];
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (lane == 0 && row < rows) out[row] = static_cast<T>(sum);
}

template <class T, class Run>
void sum_pieces(const T* pieces, const RowGrid& grid, T* out, Run& run) {
  constexpr std::int64_t kWarps = kBlockThreads / 32;
  run(sum_pieces_kernel<T>, grid_of((grid.rows + kWarps - 1) / kWarps), kBlockThreads, 0, pieces, grid.pieces,
      grid.rows, out);
}

}  // namespace fastgen
