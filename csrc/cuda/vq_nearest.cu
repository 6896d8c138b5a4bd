// Nearest code of every row, on the GPU; how: vq_chain.cuh.

#include <string>
#include <tuple>

#include "dispatch.h"
#include "vq_search.h"

namespace fastgen {
namespace {

std::tuple<Tensor, Tensor> vq_nearest_fwd(const Tensor& x, const Tensor& codebook, std::string metric,
                                          bool return_distance) {
  vq::check_codebook(x, codebook, "vq_nearest");
  STD_TORCH_CHECK(metric == "euclidean" || metric == "cosine", "vq_nearest: unknown metric '", metric, "'");
  std::vector<std::int64_t> shape = sizes(x);
  shape.pop_back();
  Run run(x);
  Tensor indices = torch::stable::new_empty(x, shape, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(x, return_distance ? shape : std::vector<std::int64_t>{0},
                                             acc_type(x.scalar_type()));
  const Tensor rows = torch::stable::contiguous(x), codes = torch::stable::contiguous(codebook);
  dispatch_dtype(x.scalar_type(), "vq_nearest", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    vq::search_on_gpu<S>(
        run, data<const S>(rows), data<const S>(codes), vq::sizes_of(x, codebook), metric == "cosine",
        {data<std::int64_t>(indices), return_distance ? data<acc_t<S>>(distance) : nullptr, nullptr, nullptr});
  });
  return {indices, distance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { m.impl("vq_nearest_fwd", TORCH_BOX(&vq_nearest_fwd)); }

}  // namespace fastgen
