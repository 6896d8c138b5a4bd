// A stable sort of rows by their code: least significant digit first, one counting pass a digit. Ranks come from
// the order of rows alone, so the result is always the same one.
#pragma once

#include <cstdint>

#include "carver.h"
#include "memory.cuh"

namespace fastgen::vq {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSortThreads = kDigits, kSortWarps = kSortThreads / 32;

struct Sort {
  const std::int64_t* indices;  // heads x rows, in [0, codes): the keys of the first pass, where not null
  const unsigned* keys;         // the keys of later passes, as earlier ones left them
  const int* order;             // and the rows they belong to
  std::int64_t rows, codes;     // of a head
  int total;                    // rows of all heads
  int shift;                    // of the digit
  int tile;                     // rows a block, a multiple of kSortThreads
  int tiles;
  int* counts;  // kDigits x tiles: of each digit in each tile, then the place of the first of them
  unsigned* sorted_keys;
  int* sorted_order;

  // A row's code, counted over the heads.
  __device__ __forceinline__ unsigned key(int i) const {
    if (indices == nullptr) return keys[i];
    const std::int64_t index = indices[i];
    if (index < 0 || index >= codes) __trap();
    return static_cast<unsigned>(i / rows * codes + index);
  }

  __device__ __forceinline__ int digit(unsigned key) const {
    return static_cast<int>(key >> shift) & (kDigits - 1);
  }
};

// One block a tile.
static __global__ void __launch_bounds__(kSortThreads) count_digits_kernel(const Sort a) {
  FASTGEN_SHARED(int, count, [kDigits]);
  count[threadIdx.x] = 0;
  __syncthreads();
  const int first = blockIdx.x * a.tile, last = min(a.total, first + a.tile);
  for (int i = first + threadIdx.x; i < last; i += kSortThreads) atomicAdd(&count[a.digit(a.key(i))], 1);
  __syncthreads();
  a.counts[threadIdx.x * a.tiles + blockIdx.x] = count[threadIdx.x];
}

// Sums over the threads before this one; total: of all. Every thread of the block must call it.
__device__ __forceinline__ int sum_before(int value, int* total) {
  FASTGEN_SHARED(int, of_warp, [kSortWarps]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, delta);
    if (lane >= delta) sum += other;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
  for (int w = 0; w < kSortWarps; ++w) {
    before += w < warp ? of_warp[w] : 0;
    *total += of_warp[w];
  }
  __syncthreads();
  return before + sum - value;
}

// One block: counts become the places of the first row of each digit of each tile.
static __global__ void __launch_bounds__(kSortThreads) place_digits_kernel(const Sort a) {
  const int count = kDigits * a.tiles;
  int place = 0;
  for (int first = 0; first < count; first += kSortThreads) {
    const int i = first + threadIdx.x;
    int total = 0;
    const int before = sum_before(i < count ? a.counts[i] : 0, &total);
    if (i < count) a.counts[i] = place + before;
    place += total;
  }
}

// One block a tile.
static __global__ void __launch_bounds__(kSortThreads) scatter_digits_kernel(const Sort a) {
  FASTGEN_SHARED(int, place, [kDigits]);
  // Of each warp and digit: how many rows, then the place of the first.
  FASTGEN_SHARED(int, of_warp, [kSortWarps][kDigits]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  place[threadIdx.x] = a.counts[threadIdx.x * a.tiles + blockIdx.x];
  const int begin = blockIdx.x * a.tile, end = min(a.total, begin + a.tile);
  for (int first = begin; first < end; first += kSortThreads) {
    for (int w = 0; w < kSortWarps; ++w) of_warp[w][threadIdx.x] = 0;
    __syncthreads();
    const int i = first + threadIdx.x;
    const bool exists = i < end;
    const unsigned key = exists ? a.key(i) : 0;
    const int digit = exists ? a.digit(key) : kDigits;
    const unsigned peers = __match_any_sync(0xffffffffu, digit);
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (exists && rank == 0) of_warp[warp][digit] = __popc(peers);
    __syncthreads();
    int next = place[threadIdx.x];
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = of_warp[w][threadIdx.x];
      of_warp[w][threadIdx.x] = next;
      next += count;
    }
    place[threadIdx.x] = next;
    __syncthreads();
    if (exists) {
      const int to = of_warp[warp][digit] + rank;
      a.sorted_keys[to] = key;
      a.sorted_order[to] = a.indices != nullptr ? i : a.order[i];
    }
    __syncthreads();
  }
}

struct SortedRows {
  unsigned* codes;  // of each row, ascending
  int* order;       // the rows
};

// The rows of `heads` heads by code; code k of head h counts as h * codes + k. Indices out of range end the kernel
// with an error. run: as in vq_chain.cuh.
template <class Run>
SortedRows sort_by_code(Run& run, const std::int64_t* indices, std::int64_t heads, std::int64_t rows,
                        std::int64_t codes) {
  constexpr int kLeastTile = 2048, kMostTiles = 1024;
  const int total = static_cast<int>(heads * rows);
  const int share = (total + kMostTiles - 1) / kMostTiles;
  const int tile = share <= kLeastTile ? kLeastTile : (share + kSortThreads - 1) / kSortThreads * kSortThreads;
  const int tiles = (total + tile - 1) / tile;
  unsigned* keys[2];
  int *order[2], *counts;
  carve(run, [&](Carver& carver) {
    counts = carver.take<int>(std::int64_t{kDigits} * tiles);
    for (int i = 0; i < 2; ++i) {
      keys[i] = carver.take<unsigned>(total);
      order[i] = carver.take<int>(total);
    }
  });
  int from = 1;
  for (int shift = 0; shift == 0 || (static_cast<std::uint64_t>(heads * codes - 1) >> shift) != 0;
       shift += kDigitBits) {
    const Sort sort{shift == 0 ? indices : nullptr,
                    keys[from],
                    order[from],
                    rows,
                    codes,
                    total,
                    shift,
                    tile,
                    tiles,
                    counts,
                    keys[1 - from],
                    order[1 - from]};
    const dim3 grid(static_cast<unsigned>(tiles));
    run(count_digits_kernel, grid, kSortThreads, 0, sort);
    run(place_digits_kernel, dim3(1), kSortThreads, 0, sort);
    run(scatter_digits_kernel, grid, kSortThreads, 0, sort);
    from = 1 - from;
  }
  return {keys[from], order[from]};
}

}  // namespace fastgen::vq
