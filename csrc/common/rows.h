// A (B, ...) tensor as rows; for hosts with the stable ABI.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastgen {

// B rows of M elements that lie densely, whatever the distance between rows: slices of a larger tensor (the halves
// of a coupling, chunks of a conditioner's output) are used where they lie.
struct Rows {
  torch::stable::Tensor tensor;
  std::int64_t count, size, stride;

  explicit Rows(const torch::stable::Tensor& t) : tensor(t) {
    if (!dense_rows(tensor)) tensor = torch::stable::contiguous(t);
    count = tensor.size(0);
    size = count == 0 ? 0 : tensor.numel() / count;
    stride = count > 1 ? tensor.stride(0) : size;
  }

  // Whether one row follows the other without a gap.
  bool dense() const { return stride == size; }

  template <class S>
  const S* row(std::int64_t i) const {
    return static_cast<const S*>(tensor.data_ptr()) + i * stride;
  }

 private:
  static bool dense_rows(const torch::stable::Tensor& t) {
    std::int64_t expected = 1;
    for (std::int64_t d = t.dim() - 1; d > 0; --d) {
      if (t.size(d) != 1 && t.stride(d) != expected) return false;
      expected *= t.size(d);
    }
    return true;
  }
};

}  // namespace fastgen
