// Tensors of the stable ABI and their element types, for hosts.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Per-sample results (KL, log-det, distances) are float32 but for float64 inputs.
inline ScalarType acc_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a null pointer of the tensor's element type: float, double, Half or BFloat16.
template <class Half, class BFloat16, class F>
void dispatch_floating(ScalarType t, const char* op, F&& f) {
  switch (t) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, float16 or bfloat16");
  }
}

inline std::vector<std::int64_t> sizes(const Tensor& t) {
  std::vector<std::int64_t> result(static_cast<std::size_t>(t.dim()));
  for (std::size_t d = 0; d < result.size(); ++d) result[d] = t.size(static_cast<std::int64_t>(d));
  return result;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace fastgen
