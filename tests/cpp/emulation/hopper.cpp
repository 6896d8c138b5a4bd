// Copies and products of csrc/cuda/hopper.cuh on the emulator: `hopper NAME SEED` runs a small pipeline, right or
// with a planted defect. Exit status 1: the result is wrong; 2: the emulator found the defect and says so.

#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/hopper.cuh"
#include "cuda/memory.cuh"

using namespace fastgen;

namespace {

enum class Defect { kNone, kNoCopyWait, kNoProductWait, kEarlyRelease, kMissingBytes, kTwoArrivals, kStartedAnew };

constexpr int kWidth = 128, kDepth = kWidth / 2, kRows = 64, kColumns = 128, kTiles = 3;
constexpr int kRowBytes = kRows * kWidth, kTileBytes = kColumns * kWidth;

// Where 16-byte piece `piece` of a row lies.
int place(int row, int piece) { return row * kWidth + (piece ^ row % 8) * 16; }

// out[kRows][kColumns] = the sum over the tiles of rows times tile. One warpgroup, and a warp that copies.
__global__ void pipeline(Defect defect, const unsigned char* rows, const unsigned char* tiles, float* out) {
  FASTGEN_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const ring = shared + kRowBytes;
  auto* const full = reinterpret_cast<std::uint64_t*>(ring + kTileBytes);
  std::uint64_t* const empty = full + 1;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 4);
    mbarrier_init_done();
  }
  __syncthreads();
  if (warp == 4) {
    if (lane != 0) return;
    for (int tile = 0; tile < kTiles; ++tile) {
      mbarrier_wait(empty, tile % 2 ^ 1);
      const int row_bytes = tile == 0 ? kRowBytes : 0;
      mbarrier_arrive_expecting(full, kTileBytes + row_bytes + (defect == Defect::kMissingBytes ? 16 : 0));
      if (row_bytes > 0) bulk_copy(shared, rows, row_bytes, full);
      bulk_copy(ring, tiles + tile * kTileBytes, kTileBytes, full);
    }
    return;
  }
  float sum[64] = {};
  const std::uint64_t a = matrix_descriptor(shared_address(shared), kWidth);
  const std::uint64_t b = matrix_descriptor(shared_address(ring), kWidth);
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty);
    if (lane == 1 && defect == Defect::kTwoArrivals) mbarrier_arrive(empty);
  };
  for (int tile = 0; tile < kTiles; ++tile) {
    if (defect != Defect::kNoCopyWait) mbarrier_wait(full, tile % 2);
    wgmma_fence();
    for (int k = 0; k < kDepth / 16; ++k) {
      wgmma_m64n128k16_f16(sum, a + 2 * k, b + 2 * k, defect != Defect::kStartedAnew || k > 0);
    }
    wgmma_commit();
    if (defect == Defect::kEarlyRelease) release();
    if (defect != Defect::kNoProductWait) wgmma_wait<0>(sum);
    if (defect != Defect::kEarlyRelease) release();
  }
  for (int i = 0; i < 64; ++i) {
    out[(warp * 16 + i / 2 % 2 * 8 + lane / 4) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

// Small integers, whose sums are exact.
float value(int row, int k) { return static_cast<float>((row * 7 + k * 5) % 11 - 5); }

void fill(unsigned char* image, int first, int rows) {
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      auto* piece = reinterpret_cast<__half*>(image + place(row, k / 8));
      piece[k % 8] = __float2half_rn(value(first + row, k));
    }
  }
}

const char* const kNames[] = {"right",         "no_copy_wait", "no_product_wait", "early_release",
                              "missing_bytes", "two_arrivals", "started_anew"};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 3;
  int defect = 0;
  while (defect < 7 && kNames[defect] != std::string(argv[1])) ++defect;
  if (defect == 7) return 3;
  alignas(16) static unsigned char rows[kRowBytes], tiles[kTiles * kTileBytes];
  fill(rows, 0, kRows);
  for (int t = 0; t < kTiles; ++t) fill(tiles + t * kTileBytes, t * kColumns, kColumns);
  std::vector<float> out(kRows * kColumns, NAN);
  const emulation::LaunchShape shape{dim3(1), dim3(160), kRowBytes + kTileBytes + 16,
                                     static_cast<unsigned>(std::stoul(argv[2]))};
  try {
    emulation::launch(shape, [&] { pipeline(static_cast<Defect>(defect), rows, tiles, out.data()); });
  } catch (const emulation::KernelError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float expected = 0;
      for (int t = 0; t < kTiles; ++t) {
        for (int k = 0; k < kDepth; ++k) expected += value(row, k) * value(t * kColumns + column, k);
      }
      if (!(out[row * kColumns + column] == expected)) return 1;
    }
  }
  return 0;
}
