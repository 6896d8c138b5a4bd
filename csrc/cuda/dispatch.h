// Element types of tensors, on the host.
#pragma once

#include <vector>

#include "element.cuh"
#include "launch.h"

namespace fastgen {

// Per-sample results are float32 but for float64 inputs.
inline ScalarType acc_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a null pointer of the tensor's element type: float, double, __half or __nv_bfloat16.
template <class F>
void dispatch_dtype(ScalarType t, const char* op, F&& f) {
  switch (t) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": expected a floating dtype");
  }
}

inline std::vector<std::int64_t> sizes(const Tensor& t) {
  std::vector<std::int64_t> result(static_cast<std::size_t>(t.dim()));
  for (std::size_t d = 0; d < result.size(); ++d) result[d] = t.size(static_cast<std::int64_t>(d));
  return result;
}

}  // namespace fastgen
