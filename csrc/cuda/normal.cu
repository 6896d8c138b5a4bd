// Standard normal values of a key of counter-based noise, on the GPU.

#include "normal.cuh"

#include "arguments.h"
#include "run.h"

namespace fastgen {
namespace {

Tensor normal(const Tensor& key, std::vector<std::int64_t> size, ScalarType dtype) {
  check_shape(key, key, {2}, ScalarType::Long, "normal: key");
  std::int64_t count = 1;
  for (const std::int64_t n : size) {
    STD_TORCH_CHECK(n >= 0, "normal: size must not be negative");
    count *= n;
  }
  Tensor out = torch::stable::new_empty(key, size, dtype);
  const Tensor dense = torch::stable::contiguous(key);
  Run run(key);
  dispatch_dtype(dtype, "normal", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    normal_values(data<const std::int64_t>(dense), count, data<S>(out), run);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { m.impl("normal", TORCH_BOX(&normal)); }

}  // namespace fastgen
