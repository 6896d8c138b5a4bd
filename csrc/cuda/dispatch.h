// Element types of tensors, on the host.
#pragma once

#include "../common/tensors.h"
#include "element.cuh"

namespace fastgen {

// Calls f with a null pointer of the tensor's element type: float, double, __half or __nv_bfloat16.
template <class F>
void dispatch_dtype(ScalarType t, const char* op, F&& f) {
  dispatch_floating<__half, __nv_bfloat16>(t, op, f);
}

}  // namespace fastgen
