// The exact nearest-code search, shared by vq_nearest and vq_quantize. How it works: vq_nearest.cpp.
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

  std::int64_t offset(std::int64_t head, std::int64_t row) const {
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

// Rows a block; a function of the number of rows alone, so that sums by block never depend on threads.
std::int64_t block_rows(std::int64_t rows);

void check_codebook(const Tensor& x, const Tensor& codebook, const char* op);

// Writes the index of the nearest code of every row, and its distance where `distance` is not null; calls
// visit(found, block) for every block, from several threads. x and the codebook have passed check_codebook.
template <class T>
void vq_search(const Tensor& x, const Codebook<T>& codebook, bool cosine, std::int64_t* indices, T* distance,
               const std::function<void(const FoundRows<T>&, std::int64_t block)>& visit);

}  // namespace fastgen
