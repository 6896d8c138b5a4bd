// What every CUDA op file (.cu) includes: the stable ABI, and the device and stream to launch on.
#pragma once

#include <cstdint>
#include <limits>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../common/tensors.h"

namespace fastgen {

// Makes the tensor's device the current one for its lifetime, and holds the stream that PyTorch uses there.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launch(const Tensor& t) : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}

 private:
  static cudaStream_t current_stream(std::int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

}  // namespace fastgen
