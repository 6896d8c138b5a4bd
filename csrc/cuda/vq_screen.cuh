// The screen of the nearest-code search: every row against every code in half precision on tensor cores. No score
// is stored: a thread keeps, of the chunks of codes that are its own, the least score, the chunk that holds it and
// the least of the other chunks. vq_settle.cuh makes exact answers of that.
#pragma once

#include "memory.cuh"
#include "ptx.cuh"
#include "vq_pack.cuh"

namespace fastgen::vq {

// Of one row, over one part of the codes.
struct alignas(16) Minimum {
  float best, second;  // the least score of any chunk, and of any other chunk
  int chunk;           // codes [chunk, chunk + 1) * chunk_codes(width)
  int unused;
};

struct Screen {
  Problem problem;
  const unsigned char *rows, *codes;  // images, heads x
  const float* start;                 // heads x padded codes
  const RowFacts* row_facts;          // heads x rows
  int splits;                         // of the code tiles, one a block
  Minimum* minima;                    // heads x rows x parts
  int parts;

  __device__ __forceinline__ float unit(std::int64_t head, std::int64_t row) const {
    return row < problem.rows ? row_facts[head * problem.rows + row].unit : 1;
  }

  FASTGEN_HD std::int64_t first_tile(int split) const { return problem.code_tiles() * split / splits; }
};

// The running minima of one row in one thread.
struct Best {
  float best = INFINITY, second = INFINITY;
  int chunk = 0;

  __device__ __forceinline__ void offer(float score, int candidate) {
    second = fminf(second, fmaxf(best, score));
    chunk = score < best ? candidate : chunk;
    best = fminf(score, best);
  }

  __device__ Minimum result() const { return {best, second, chunk, 0}; }
};

// Offers the scores of one thread: rows g and g + 8 of a tile of 16 against 8 kGroups columns. products: of each
// group of eight columns those of 2 t, 2 t + 1 for row g, then for row g + 8. start: of column 2 t; units: of the
// rows. first_chunk: of the columns, t included.
template <int kGroups, int kChunk, bool kFolded>
__device__ __forceinline__ void offer_scores(const float* products, const float* start, const float (&units)[2],
                                             int first_chunk, Best (&rows)[2]) {
  constexpr int kPerChunk = kChunk / 2;
  static_assert(kGroups % kPerChunk == 0);
#pragma unroll
  for (int c = 0; c < kGroups / kPerChunk; ++c) {
    float least[2] = {INFINITY, INFINITY};
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      const int group = c * kPerChunk + i;
      float2 from;
      if constexpr (!kFolded) from = *reinterpret_cast<const float2*>(start + 8 * group);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float2 two = make_float2(products[4 * group + 2 * r], products[4 * group + 2 * r + 1]);
        if constexpr (!kFolded) two = make_float2(fmaf(from.x, units[r], two.x), fmaf(from.y, units[r], two.y));
        const float low = fminf(two.x, two.y);
        least[r] = i == 0 ? low : fminf(least[r], low);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r].offer(least[r], first_chunk + 4 * c);
  }
}

// Warps that share the rows of a block, and the columns of a tile.
constexpr int kMmaRowWarps = 4, kMmaColumnWarps = 2, kMmaThreads = 32 * kMmaRowWarps * kMmaColumnWarps;
constexpr int kMmaRows = 32 * kMmaRowWarps, kMmaStages = 3;
constexpr int kMmaParts = 4 * kMmaColumnWarps;

// Rows stay in shared memory where these many blocks of columns hold them.
FASTGEN_HD inline bool mma_rows_stay(const ImageShape& s) { return s.blocks <= 2; }

FASTGEN_HD inline int mma_shared_bytes(const ImageShape& s) {
  const int row_slots = mma_rows_stay(s) ? s.blocks : kMmaStages;
  return row_slots * kMmaRows * s.width + kMmaStages * kCodeTile * (s.width + static_cast<int>(sizeof(float)));
}

// The screen with mma.sync and cp.async. blockIdx: tile of kMmaRows rows, split, head.
template <int kWidth, bool kFolded>
__global__ void __launch_bounds__(kMmaThreads, 2) screen_mma_kernel(const Screen a) {
  constexpr int kChunk = chunk_codes(kWidth), kRowBytes = kMmaRows * kWidth, kCodeBytes = kCodeTile * kWidth;
  constexpr int kColumns = kCodeTile / kMmaColumnWarps, kGroups = kColumns / 8;
  FASTGEN_DYNAMIC_SHARED(unsigned char, shared);
  const ImageShape s = a.problem.shape;
  const bool stay = mma_rows_stay(s);
  unsigned char* const row_ring = shared;
  unsigned char* const code_ring = row_ring + (stay ? s.blocks : kMmaStages) * kRowBytes;
  auto* const start_ring = reinterpret_cast<float*>(code_ring + kMmaStages * kCodeBytes);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_warp = warp / kMmaColumnWarps, column_warp = warp % kMmaColumnWarps;
  const std::int64_t head = blockIdx.z, first_row = std::int64_t{blockIdx.x} * kMmaRows;
  const std::int64_t first_tile = a.first_tile(blockIdx.y);
  const int tiles = static_cast<int>(a.first_tile(blockIdx.y + 1) - first_tile);
  const unsigned char* rows =
      a.rows + head * a.problem.row_image_bytes() + first_row / kRowTile * s.tile_bytes(kRowTile);
  const unsigned char* codes =
      a.codes + head * a.problem.code_image_bytes() + first_tile * s.tile_bytes(kCodeTile);
  const float* start = a.start + head * a.problem.padded_codes() + first_tile * kCodeTile;

  // Asks for the next block of codes, and of rows where they have to come again.
  int load_tile = 0, load_block = 0, load_slot = 0;
  const auto load = [&] {
    if (load_tile < tiles) {
      for (int i = threadIdx.x * 16; i < kCodeBytes; i += kMmaThreads * 16) {
        cp_async_16(code_ring + load_slot * kCodeBytes + i, codes + i);
      }
      codes += kCodeBytes;
      if (!kFolded && load_block == s.blocks - 1 && threadIdx.x < kCodeTile / 4) {
        cp_async_16(start_ring + load_slot * kCodeTile + threadIdx.x * 4,
                    start + load_tile * kCodeTile + threadIdx.x * 4);
      }
      if (!stay || load_tile == 0) {
        constexpr int kTileBytes = kRowTile * kWidth;
        unsigned char* to = row_ring + (stay ? load_block : load_slot) * kRowBytes;
#pragma unroll 1
        for (int i = threadIdx.x * 16; i < kRowBytes; i += kMmaThreads * 16) {
          cp_async_16(to + i,
                      rows + i / kTileBytes * s.tile_bytes(kRowTile) + load_block * kTileBytes + i % kTileBytes);
        }
      }
      if (++load_block == s.blocks) {
        load_block = 0;
        ++load_tile;
      }
      if (++load_slot == kMmaStages) load_slot = 0;
    }
    cp_async_commit();
  };
  for (int i = 0; i < kMmaStages - 1; ++i) load();

  Best best[2][2];
  // The units of four rows, by their exponents: registers are short.
  unsigned exponents = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float unit = a.unit(head, first_row + row_warp * 32 + i * 8 + lane / 4);
    exponents |= __float_as_uint(unit) >> 23 << 8 * i;
  }
  float products[2][kGroups * 4];
  int slot = 0, chunk = static_cast<int>((first_tile * kCodeTile + column_warp * kColumns) / kChunk) + lane % 4;
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kGroups * 4; ++i) products[0][i] = products[1][i] = 0;
    const float* from = start_ring;
    for (int block = 0; block < s.blocks; ++block) {
      cp_async_wait<kMmaStages - 2>();
      __syncthreads();
      load();
      const unsigned char* row_block = row_ring + (stay ? block : slot) * kRowBytes;
      const unsigned char* code_block = code_ring + slot * kCodeBytes;
      from = start_ring + slot * kCodeTile + column_warp * kColumns + 2 * (lane % 4);
      if (++slot == kMmaStages) slot = 0;
      const int steps = s.depth / 16 - block * (kWidth / 32);
#pragma unroll
      for (int k = 0; k < kWidth / 32; ++k) {
        if (k >= steps) break;
        std::uint32_t x[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int row = row_warp * 32 + m * 16 + lane % 16;
          ldmatrix_x4(x[m], row_block + row / kRowTile * kRowTile * kWidth +
                                swizzled(row % kRowTile, 2 * k + lane / 16, kWidth));
        }
#pragma unroll
        for (int n = 0; n < kGroups; n += 2) {
          std::uint32_t e[4];
          const int column = column_warp * kColumns + n * 8 + lane / 16 * 8 + lane % 8;
          ldmatrix_x4(e, code_block + swizzled(column, 2 * k + lane / 8 % 2, kWidth));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float (&sum)[4] = *reinterpret_cast<float (*)[4]>(products[i / 2] + 4 * (n + i % 2));
            mma_m16n8k16_f16(sum, x[i / 2], {e[i % 2 * 2], e[i % 2 * 2 + 1]}, sum);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float units[2] = {__uint_as_float((exponents >> (16 * m) & 255) << 23),
                              __uint_as_float((exponents >> (16 * m + 8) & 255) << 23)};
      offer_scores<kGroups, kChunk, kFolded>(products[m], from, units, chunk, best[m]);
    }
    chunk += kCodeTile / kChunk;
  }
  cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t row = first_row + row_warp * 32 + m * 16 + r * 8 + lane / 4;
      const int part = (blockIdx.y * kMmaColumnWarps + column_warp) * 4 + lane % 4;
      if (row < a.problem.rows) a.minima[(head * a.problem.rows + row) * a.parts + part] = best[m][r].result();
    }
  }
}

}  // namespace fastgen::vq
