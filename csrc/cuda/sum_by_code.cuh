// Sums of rows by code, always added up in the same order and in float64: rows sorted by code are cut into pieces
// of the same size, whoever they belong to, so that codes of many rows take no longer.
#pragma once

#include "element.cuh"
#include "sort_by_code.cuh"

namespace fastgen::vq {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / 32;
constexpr int kPieceRows = 64;
// A lane adds up these many columns, 32 apart.
constexpr int kLaneColumns = 4, kSumColumns = 32 * kLaneColumns;

// out[c] = factor * *scale * sum of (x_n - codes[c]) over the rows n with code c; without codes the sum of x_n
// alone.
template <class S, class O>
struct SumByCode {
  const S* x;      // rows x D
  const S* codes;  // may be null
  double factor;
  const acc_t<S>* scale;  // may be null: one
  SortedRows sorted;
  std::int64_t rows, code_count;
  int size;
  int* begin;  // code_count + 1: where the rows of a code begin
  double*
      carried;  // pieces x 2 x D: sums of rows whose code has others in earlier pieces, and in later pieces only
  O* out;
  acc_t<S>* counts;  // may be null

  __device__ double total_factor() const {
    return scale == nullptr ? factor : factor * static_cast<double>(*scale);
  }
};

// The first of the sorted rows whose code is not below `code`.
__device__ inline int first_of_code(const unsigned* codes, int rows, std::int64_t code) {
  int low = 0, high = rows;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (codes[middle] < code)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One thread a code: where its rows begin, and how many they are. The sums of codes without rows become zero here.
template <class S, class O>
__global__ void __launch_bounds__(kSumThreads) find_codes_kernel(const SumByCode<S, O> a) {
  const std::int64_t code = std::int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const bool exists = code < a.code_count;
  const int begin = exists ? first_of_code(a.sorted.codes, static_cast<int>(a.rows), code) : 0;
  const int end = exists ? first_of_code(a.sorted.codes, static_cast<int>(a.rows), code + 1) : 0;
  if (exists) {
    a.begin[code] = begin;
    if (code == a.code_count - 1) a.begin[code + 1] = end;
    if (a.counts != nullptr) a.counts[code] = static_cast<acc_t<S>>(end - begin);
  }
  const int lane = threadIdx.x % 32;
  for (unsigned empty = __ballot_sync(0xffffffffu, exists && begin == end); empty != 0; empty &= empty - 1) {
    O* out = a.out + (code - lane + __ffs(empty) - 1) * a.size;
    for (int j = lane; j < a.size; j += 32) narrow(acc_t<O>(0), out + j);
  }
}

// One warp a piece. blockIdx.y: kSumColumns columns.
template <class S, class O>
__global__ void __launch_bounds__(kSumThreads) sum_pieces_by_code_kernel(const SumByCode<S, O> a) {
  constexpr int kAhead = 4;
  const int lane = threadIdx.x % 32;
  const std::int64_t piece = std::int64_t{blockIdx.x} * kSumWarps + threadIdx.x / 32, first = piece * kPieceRows;
  if (first >= a.rows) return;
  const int count = static_cast<int>(a.rows - first < kPieceRows ? a.rows - first : kPieceRows);
  const int column = blockIdx.y * kSumColumns + lane;
  const double factor = a.total_factor();
  double sum[kLaneColumns] = {}, code_value[kLaneColumns] = {};
  std::int64_t code = a.sorted.codes[first];

  const auto begin_code = [&] {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int j = column + 32 * i;
      sum[i] = 0;
      if (a.codes != nullptr && j < a.size) code_value[i] = static_cast<double>(widen(a.codes[code * a.size + j]));
    }
  };
  const auto end_code = [&] {
    const int begin = a.begin[code];
    const bool whole = begin >= first && a.begin[code + 1] <= first + kPieceRows;
    double* carried = a.carried + (piece * 2 + (begin < first ? 0 : 1)) * a.size;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int j = column + 32 * i;
      if (j >= a.size) continue;
      if (whole)
        narrow(static_cast<acc_t<O>>(factor * sum[i]), a.out + code * a.size + j);
      else
        carried[j] = sum[i];
    }
  };

  begin_code();
  for (int r = 0; r < count; r += kAhead) {
    acc_t<S> x[kAhead][kLaneColumns] = {};
    std::int64_t codes[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (r + n >= count) break;
      codes[n] = a.sorted.codes[first + r + n];
      const S* row = a.x + std::int64_t{a.sorted.order[first + r + n]} * a.size;
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        if (column + 32 * i < a.size) x[n][i] = widen(row[column + 32 * i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (r + n >= count) break;
      if (codes[n] != code) {
        end_code();
        code = codes[n];
        begin_code();
      }
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) sum[i] += static_cast<double>(x[n][i]) - code_value[i];
    }
  }
  end_code();
}

// One block a piece: adds up the code whose rows begin in it and go on in later ones. blockIdx.y: 32 columns.
template <class S, class O>
__global__ void __launch_bounds__(kSumThreads) join_pieces_kernel(const SumByCode<S, O> a) {
  FASTGEN_SHARED(double, of_warp, [kSumWarps][32]);
  const std::int64_t first = blockIdx.x, next_row = (first + 1) * kPieceRows;
  if (next_row >= a.rows) return;
  const std::int64_t code = a.sorted.codes[next_row - 1];
  if (a.begin[code] < first * kPieceRows || a.begin[code + 1] <= next_row) return;
  const std::int64_t last = (a.begin[code + 1] - 1) / kPieceRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = blockIdx.y * 32 + lane;
  double sum = 0;
  if (j < a.size) {
#pragma unroll 4
    for (std::int64_t p = first + warp; p <= last; p += kSumWarps) {
      sum += a.carried[(p * 2 + (p == first ? 1 : 0)) * a.size + j];
    }
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || j >= a.size) return;
  for (int w = 1; w < kSumWarps; ++w) sum += of_warp[w][lane];
  narrow(static_cast<acc_t<O>>(a.total_factor() * sum), a.out + code * a.size + j);
}

// run: as in vq_chain.cuh. Fills in what it works in.
template <class S, class O, class Run>
void sum_by_code(Run& run, const std::int64_t* indices, std::int64_t heads, std::int64_t rows, std::int64_t codes,
                 SumByCode<S, O> a) {
  a.rows = heads * rows;
  a.code_count = heads * codes;
  const std::int64_t pieces = (a.rows + kPieceRows - 1) / kPieceRows;
  carve(run, [&](Carver& carver) {
    a.begin = carver.take<int>(a.code_count + 1);
    a.carried = carver.take<double>(pieces * 2 * a.size);
  });
  if (a.rows > 0) a.sorted = sort_by_code(run, indices, heads, rows, codes);
  const auto blocks = [](std::int64_t items, std::int64_t each) {
    return static_cast<unsigned>((items + each - 1) / each);
  };
  run(find_codes_kernel<S, O>, dim3(blocks(a.code_count, kSumThreads)), kSumThreads, 0, a);
  if (a.rows == 0 || a.size == 0) return;
  run(sum_pieces_by_code_kernel<S, O>, dim3(blocks(pieces, kSumWarps), blocks(a.size, kSumColumns)), kSumThreads,
      0, a);
  run(join_pieces_kernel<S, O>, dim3(blocks(pieces, 1), blocks(a.size, 32)), kSumThreads, 0, a);
}

}  // namespace fastgen::vq
