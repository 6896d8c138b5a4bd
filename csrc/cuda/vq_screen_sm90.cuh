// The screen of vq_screen.cuh for compute capability 9.0. One warp streams tiles of codes through a ring of shared
// memory; every warpgroup multiplies its own 64 rows with each of them. While one warpgroup looks for its minima,
// the products of the others keep the tensor cores busy.
#pragma once

#include "hopper.cuh"
#include "vq_screen.cuh"

namespace fastgen::vq {

constexpr int kMostStages = 8;
constexpr int kSm90Parts = 4;

// Bytes of shared memory for a ring of `stages` tiles.
FASTGEN_HD inline int sm90_shared_bytes(const ImageShape& s, int warpgroups, int stages) {
  const int rows = warpgroups * s.blocks * kRowTile * s.width;
  const int stage = kCodeTile * (s.width + static_cast<int>(sizeof(float)));
  return rows + stages * stage + (2 * kMostStages + 1) * static_cast<int>(sizeof(std::uint64_t));
}

FASTGEN_HD constexpr int sm90_threads(int warpgroups) { return warpgroups * 128 + 32; }

// blockIdx: tile of kWarpgroups * kRowTile rows, split, head.
template <int kWidth, bool kFolded, int kWarpgroups>
__global__ void __launch_bounds__(sm90_threads(kWarpgroups), 1)
    screen_sm90_kernel(const Screen a, const int stages) {
#if defined(FASTGEN_HOPPER)
  constexpr int kChunk = chunk_codes(kWidth), kSteps = kWidth / 32, kCodeBytes = kCodeTile * kWidth;
  constexpr int kStartBytes = kFolded ? 0 : kCodeTile * static_cast<int>(sizeof(float));
  FASTGEN_DYNAMIC_SHARED(unsigned char, shared);
  const ImageShape s = a.problem.shape;
  const int row_bytes = s.blocks * kRowTile * kWidth;
  unsigned char* const code_ring = shared + kWarpgroups * row_bytes;
  auto* const start_ring = reinterpret_cast<float*>(code_ring + stages * kCodeBytes);
  auto* const full = reinterpret_cast<std::uint64_t*>(start_ring + stages * kCodeTile);
  std::uint64_t* const empty = full + kMostStages;
  std::uint64_t* const rows_there = empty + kMostStages;

  // The same in all lanes, which the compiler must see to keep products in flight.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const std::int64_t head = blockIdx.z, first_row = std::int64_t{blockIdx.x} * kWarpgroups * kRowTile;
  const std::int64_t first_tile = a.first_tile(blockIdx.y);
  const int tiles = static_cast<int>(a.first_tile(blockIdx.y + 1) - first_tile);
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4 * kWarpgroups);
    }
    mbarrier_init(rows_there, 1);
    mbarrier_init_done();
  }
  __syncthreads();

  int slot = 0;
  unsigned parity = 0;
  const auto advance = [&] {
    if (++slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  };

  if (warp == 4 * kWarpgroups) {
    if (lane != 0) return;
    const unsigned char* rows =
        a.rows + head * a.problem.row_image_bytes() + first_row / kRowTile * s.tile_bytes(kRowTile);
    mbarrier_arrive_expecting(rows_there, kWarpgroups * row_bytes);
    bulk_copy(shared, rows, kWarpgroups * row_bytes, rows_there);
    const unsigned char* codes =
        a.codes + head * a.problem.code_image_bytes() + first_tile * s.tile_bytes(kCodeTile);
    const float* start = a.start + head * a.problem.padded_codes() + first_tile * kCodeTile;
    for (int tile = 0; tile < tiles; ++tile) {
      for (int block = 0; block < s.blocks; ++block) {
        const bool last = !kFolded && block == s.blocks - 1;
        mbarrier_wait(empty + slot, parity ^ 1);
        mbarrier_arrive_expecting(full + slot, kCodeBytes + (last ? kStartBytes : 0));
        bulk_copy(code_ring + slot * kCodeBytes, codes, kCodeBytes, full + slot);
        if (last) bulk_copy(start_ring + slot * kCodeTile, start, kStartBytes, full + slot);
        codes += kCodeBytes;
        advance();
      }
      start += kCodeTile;
    }
    return;
  }

  const int warpgroup = warp / 4;
  const std::uint64_t row_matrix = matrix_descriptor(shared_address(shared + warpgroup * row_bytes), kWidth);
  const std::uint64_t code_matrix = matrix_descriptor(shared_address(code_ring), kWidth);
  const auto release = [&](int which) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + which);
  };
  Best best[2];
  float units[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) units[r] = a.unit(head, first_row + warp * 16 + r * 8 + g);
  float products[64];
  int chunk = static_cast<int>(first_tile * (kCodeTile / kChunk)) + t;
  mbarrier_wait(rows_there, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    int used = 0;
    for (int block = 0; block < s.blocks; ++block) {
      mbarrier_wait(full + slot, parity);
      wgmma_fence();
      // Descriptors count 16 bytes, and a step is 32.
      const std::uint64_t x = row_matrix + static_cast<unsigned>(block * kRowTile * kWidth / 16);
      const std::uint64_t e = code_matrix + static_cast<unsigned>(slot * kCodeBytes / 16);
      const int steps = s.depth / 16 - block * kSteps;
      if (steps >= kSteps) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) wgmma_m64n128k16_f16(products, x + 2 * k, e + 2 * k, block + k > 0);
      } else {
#pragma unroll 1
        for (int k = 0; k < steps; ++k) wgmma_m64n128k16_f16(products, x + 2 * k, e + 2 * k, block + k > 0);
      }
      wgmma_commit();
      if (block > 0) {
        wgmma_wait<1>(products);
        release(used);
      }
      used = slot;
      advance();
    }
    wgmma_wait<0>(products);
    offer_scores<kCodeTile / 8, kChunk, kFolded>(products, start_ring + used * kCodeTile + 2 * t, units, chunk,
                                                 best);
    release(used);
    chunk += kCodeTile / kChunk;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t row = first_row + warp * 16 + r * 8 + g;
    if (row >= a.problem.rows) continue;
    a.minima[(head * a.problem.rows + row) * a.parts + blockIdx.y * kSm90Parts + t] = best[r].result();
  }
#else
  __trap();
#endif
}

}  // namespace fastgen::vq
