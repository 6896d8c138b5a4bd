// What vq_nearest, vq_quantize and vq_codebook_stats share: rows wherever they lie, the exact search (how it
// works: vq_nearest.cpp) and sums by code (vq_codebook_stats.cpp).
#pragma once

#include <functional>

#include "common.h"

namespace fastgen {

// x (..., D) as H heads of N rows of D elements, read where they lie: leading dimensions that do not fold into
// two strides are the only ones copied.
struct Tokens {
  Tensor tensor;
  std::int64_t heads, rows, size;
  std::int64_t head_stride, outer_stride, inner, inner_stride, element_stride;

  Tokens(const Tensor& x, bool with_heads);

  bool dense() const { return element_stride == 1 && (rows <= 1 || (inner == rows && inner_stride == size)); }

  std::int64_t offset(std::int64_t head, std::int64_t row) const {
    if (row < inner) return head * head_stride + row * inner_stride;
    return head * head_stride + row / inner * outer_stride + row % inner * inner_stride;
  }
};

// A codebook (K, D) or (H, K, D) in the arithmetic type, dense.
template <class T>
struct Codebook {
  Tensor tensor;
  std::int64_t heads, count, size;

  explicit Codebook(const Tensor& codebook);

  const T* head(std::int64_t h) const { return data<T>(tensor) + h * count * size; }
};

// Up to kBlockRows rows of one head, dense and in the arithmetic type, and the code chosen for each. `first`
// counts rows over all heads.
template <class T>
struct FoundRows {
  const T* rows;
  const std::int64_t* indices;
  const T* codes;
  std::int64_t first, count, size;
};

constexpr std::int64_t kBlockRows = 240;

// Rows that are scored together: blocks hold whole tiles.
constexpr std::int64_t kMaxTileRows = 6;

constexpr std::int64_t whole_tiles(std::int64_t rows) {
  return (rows + kMaxTileRows - 1) / kMaxTileRows * kMaxTileRows;
}

// Rows [first, first + count) of a head, dense and in the arithmetic type: where they lie, if they lie so, else
// copied to `buffer`.
template <class S>
const acc_t<S>* dense_rows(const Tokens& tokens, std::int64_t head, std::int64_t first, std::int64_t count,
                           acc_t<S>* buffer);

// Rows a block; a function of the number of rows alone, so that sums by block never depend on threads.
std::int64_t block_rows(std::int64_t rows);

// How many blocks vq_search visits.
std::int64_t block_count(const Tokens& x);

void check_codebook(const Tensor& x, const Tensor& codebook, const char* op);

// Throws std::invalid_argument (in Python a ValueError) for an index outside [0, codebook_size).
void check_indices(const std::int64_t* indices, std::int64_t count, std::int64_t codebook_size);

// Writes the index of the nearest code of every row, and its distance where `distance` is not null; calls
// visit(found, block) for every block, from several threads. x and the codebook have passed check_codebook.
template <class T>
void vq_search(const Tokens& x, const Codebook<T>& codebook, bool cosine, std::int64_t* indices, T* distance,
               const std::function<void(const FoundRows<T>&, std::int64_t block)>& visit);

// out[c] = scale * sum of (x_n - codes[c]) over the rows n with code c, in row order, in float64; without codes
// the sum of x_n alone. The codes of head h are h * codebook_size + its indices. counts may be null. Indices are
// those of check_indices.
template <class S, class O>
void sum_by_code(const Tokens& x, const std::int64_t* indices, std::int64_t codebook_size, const acc_t<S>* codes,
                 double scale, O* out, acc_t<S>* counts);

}  // namespace fastgen
