// Nearest code of every row, on the GPU; how: vq_chain.cuh.

#include <string>
#include <tuple>

#include "dispatch.h"
#include "vq_search.h"

namespace fastgen::vq {

void check_codebook(const Tensor& x, const Tensor& codebook, const char* op) {
  const std::int64_t dims = codebook.dim();
  STD_TORCH_CHECK(x.is_cuda() && codebook.is_cuda() && x.get_device_index() == codebook.get_device_index() &&
                      x.scalar_type() == codebook.scalar_type(),
                  op, ": codebook must have the device and dtype of x");
  STD_TORCH_CHECK(x.dim() >= 1 && (dims == 2 || (dims == 3 && x.dim() == 3 && x.size(0) == codebook.size(0))), op,
                  ": codebook must be (K, D), or (H, K, D) for x (H, N, D)");
  STD_TORCH_CHECK(codebook.size(dims - 1) == x.size(x.dim() - 1), op,
                  ": codebook must have vectors of the size of x's");
  const Sizes sizes = sizes_of(x, codebook);
  STD_TORCH_CHECK(sizes.codes > 0, op, ": codebook must have at least one code");
  STD_TORCH_CHECK(sizes.size <= kMostSize && sizes.codes <= kMostCodes && sizes.heads <= kMostHeads, op,
                  ": more than 2^20 elements, 2^26 codes or 65535 heads");
}

Sizes sizes_of(const Tensor& x, const Tensor& codebook) {
  const bool heads = codebook.dim() == 3;
  Sizes sizes{heads ? codebook.size(0) : 1, 1, codebook.size(codebook.dim() - 2),
              codebook.size(codebook.dim() - 1)};
  for (std::int64_t d = heads ? 1 : 0; d + 1 < x.dim(); ++d) sizes.rows *= x.size(d);
  return sizes;
}

template <class S>
void search_on_gpu(Run& run, const S* x, const S* codes, const Sizes& sizes, bool cosine,
                   const Answers<S>& answers) {
#if defined(FASTGEN_SM90A)
  const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  const bool hopper = false;
#endif
  // L2 holds about as much of the images of rows.
  constexpr std::int64_t kRowImageBytes = std::int64_t{32} << 20;
  const Device device{device_attribute(cudaDevAttrMultiProcessorCount),
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), kRowImageBytes, hopper};
  search(run, device, x, codes, sizes, cosine, answers);
}

#define FASTGEN_VQ_SEARCH(S)                                                                                      \
  template void search_on_gpu<S>(Run&, const S*, const S*, const Sizes&, bool, const Answers<S>&);
FASTGEN_VQ_SEARCH(float)
FASTGEN_VQ_SEARCH(double)
FASTGEN_VQ_SEARCH(__half)
FASTGEN_VQ_SEARCH(__nv_bfloat16)
#undef FASTGEN_VQ_SEARCH

}  // namespace fastgen::vq

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
