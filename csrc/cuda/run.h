// How chains of kernels (<op>_chain.cuh) run on a stream; the tests run the same chains on the host emulator.
#pragma once

#include <vector>

#include "launch.h"

namespace fastgen {

class Run {
 public:
  // Work on the device of `like`, on PyTorch's current stream there.
  explicit Run(const Tensor& like) : launch_(like), like_(like) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                  const Arguments&... arguments) {
    if (shared_bytes > 0) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    kernel<<<grid, threads, shared_bytes, launch_.stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void zero(void* memory, std::int64_t bytes) {
    STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes), launch_.stream));
  }

  // Memory that lives as long as this.
  void* allocate(std::int64_t bytes) {
    memory_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return memory_.back().data_ptr();
  }

 private:
  Launch launch_;
  Tensor like_;
  std::vector<Tensor> memory_;
};

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace fastgen
