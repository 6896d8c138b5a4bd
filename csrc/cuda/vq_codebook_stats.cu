// How many rows chose each code, and their sum, on the GPU.

#include <tuple>

#include "arguments.h"
#include "run.h"
#include "sum_by_code.cuh"

namespace fastgen {
namespace {

std::tuple<Tensor, Tensor> vq_codebook_stats_fwd(const Tensor& x, const Tensor& indices,
                                                 std::int64_t codebook_size) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 1 && codebook_size >= 1,
                  "vq_codebook_stats: expected x (..., D) and at least one code");
  STD_TORCH_CHECK(
      indices.numel() <= kMost && codebook_size < kMost && x.size(x.dim() - 1) <= std::int64_t{1} << 20,
      "vq_codebook_stats: more than 2^31 rows or codes, or more than 2^20 elements a row");
  std::vector<std::int64_t> shape = sizes(x);
  const std::int64_t size = shape.back();
  shape.pop_back();
  check_shape(indices, x, shape, ScalarType::Long, "vq_codebook_stats: indices");
  Run run(x);
  const ScalarType type = acc_type(x.scalar_type());
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, type);
  Tensor sums = torch::stable::new_empty(x, {codebook_size, size}, type);
  const Tensor rows = torch::stable::contiguous(x), dense = torch::stable::contiguous(indices);
  dispatch_dtype(x.scalar_type(), "vq_codebook_stats", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    using T = acc_t<S>;
    vq::SumByCode<S, T> a{};
    a.x = data<const S>(rows);
    a.factor = 1;
    a.size = static_cast<int>(size);
    a.out = data<T>(sums);
    a.counts = data<T>(counts);
    vq::sum_by_code(run, data<const std::int64_t>(dense), 1, dense.numel(), codebook_size, a);
  });
  return {counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { m.impl("vq_codebook_stats_fwd", TORCH_BOX(&vq_codebook_stats_fwd)); }

}  // namespace fastgen
