// What every CPU op file includes first: system headers (they must come before any target pragma), the
// stable ABI, and small helpers over tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "../common/accumulate.h"
#include "../common/rows.h"
#include "../common/tensors.h"
#include "isa.h"

// For functions in the innermost loops, which gcc would otherwise call where a loop has a tail.
#define FASTGEN_INLINE inline __attribute__((always_inline))
#define FASTGEN_INLINE_LAMBDA __attribute__((always_inline))

namespace fastgen {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

template <class F>
void dispatch_dtype(ScalarType t, const char* op, F&& f) {
  dispatch_floating<Half, BFloat16>(t, op, f);
}

// Rows are cut into pieces of kPiece elements; each piece gives one partial sum, and the pieces of a row are added
// in order. The result depends on neither the number of threads nor how the pieces were handed out.
constexpr std::int64_t kPiece = 4096;

inline std::int64_t pieces(std::int64_t row_size) {
  return std::max<std::int64_t>(1, (row_size + kPiece - 1) / kPiece);
}

// f(begin, end) over ranges of the count * pieces(row_size) pieces, in parallel where there is enough work.
template <class F>
void parallel_pieces(std::int64_t count, std::int64_t row_size, F&& f) {
  const std::int64_t cost = std::clamp<std::int64_t>(row_size, 1, kPiece);
  torch::stable::parallel_for(0, count * pieces(row_size), std::max<std::int64_t>(1, 16384 / cost), f);
}

// The row and the element range [first, last) of piece i.
struct Piece {
  std::int64_t row, first, last;
  Piece(std::int64_t i, std::int64_t row_size)
      : row(i / pieces(row_size)),
        first(i % pieces(row_size) * kPiece),
        last(std::min(row_size, first + kPiece)) {}
  Piece(std::int64_t row, std::int64_t first, std::int64_t last) : row(row), first(first), last(last) {}
};

// Adds up each row's partial sums, in order.
template <class T>
void sum_pieces(const std::vector<T>& partial, std::int64_t count, T* out) {
  const std::int64_t per_row = count == 0 ? 0 : static_cast<std::int64_t>(partial.size()) / count;
  for (std::int64_t r = 0; r < count; ++r) {
    double total = 0;
    for (std::int64_t p = 0; p < per_row; ++p) total += static_cast<double>(partial[r * per_row + p]);
    out[r] = static_cast<T>(total);
  }
}

// f(partial) writes a sum for each piece; out gets those of the rows.
template <class T, class F>
void sum_rows(std::int64_t count, std::int64_t row_size, T* out, F&& f) {
  if (pieces(row_size) == 1) return f(out);
  std::vector<T> partial(count * pieces(row_size));
  f(partial.data());
  sum_pieces(partial, count, out);
}

// The raw operators are reachable as torch.ops.fastgen.*, past the checks of the public functions, so each repeats
// what its memory accesses rely on. `what` is "<op>: <argument>".
inline void check_shape(const Tensor& t, IntArrayRef shape, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.sizes().equals(shape), what,
                  " has the wrong device, dtype or shape");
}

inline void check_like(const Tensor& t, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(like.dim() >= 1, what, " must have at least one dimension");
  check_shape(t, like.sizes(), like.scalar_type(), what);
}

// Whether `count` tensors like t are together so large that most of a result has left the caches, of which the
// last level has some 32 MB, before it is read again.
inline bool exceeds_caches(const Tensor& t, int count) {
  constexpr std::int64_t kBytes = std::int64_t{48} << 20;
  return count * t.numel() * static_cast<std::int64_t>(t.element_size()) >= kBytes;
}

// Asks for huge pages under a large fresh tensor. Where Linux gives them on request ("madvise", the usual
// setting), a result costs one page fault for 2 MB instead of 512, and those faults are most of the time of an op
// that only moves memory. It is advice: a system that ignores it changes nothing else.
inline Tensor on_huge_pages(Tensor t) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(t.numel()) * t.element_size();
  if (bytes >= 2 * kPage) {
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(t.data_ptr());
    const std::uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

// Straight to ATen: torch::stable::new_empty looks the operator up by name and boxes its arguments, which is most
// of the time of a small kernel.
inline Tensor new_empty(const Tensor& like, IntArrayRef sizes, ScalarType dtype) {
  std::int32_t type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  STD_TORCH_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<std::int64_t>(sizes.size()),
                                            &type, nullptr, nullptr, 0, nullptr, &result) == AOTI_TORCH_SUCCESS,
                  "new_empty failed");
  return on_huge_pages(Tensor(result));
}

inline Tensor empty_contiguous(const Tensor& like) { return new_empty(like, like.sizes(), like.scalar_type()); }

// torch::stable::contiguous calls the dispatcher even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace fastgen
