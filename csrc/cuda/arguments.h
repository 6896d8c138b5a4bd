// Checks of the tensors that an operator gets. The raw operators are reachable as torch.ops.fastgen.*, past the
// checks of the public functions, so each repeats what its memory accesses rely on. `what` is "<op>: <argument>".
#pragma once

#include <vector>

#include "dispatch.h"

namespace fastgen {

// `t` must be on the GPU of `beside`.
inline void check_shape(const Tensor& t, const Tensor& beside, const std::vector<std::int64_t>& shape,
                        ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == beside.get_device_index() && t.scalar_type() == dtype &&
                      sizes(t) == shape,
                  what, " has the wrong device, dtype or shape");
}

inline void check_like(const Tensor& t, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(like.dim() >= 1, what, " must have at least one dimension");
  check_shape(t, like, sizes(like), like.scalar_type(), what);
}

}  // namespace fastgen
