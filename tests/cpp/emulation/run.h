// Runs chains of kernels (csrc/cuda/<op>_chain.cuh) on the host emulator; the counterpart of csrc/cuda/run.h.
#pragma once

#include <cuda_runtime.h>

#include <deque>

namespace fastgen::emulation {

class Run {
 public:
  explicit Run(unsigned seed) : seed_(seed) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                  const Arguments&... arguments) {
    const LaunchShape shape{grid, dim3(static_cast<unsigned>(threads)), static_cast<std::size_t>(shared_bytes),
                            ++seed_};
    launch(shape, [&] { kernel(arguments...); });
  }

  void zero(void* memory, std::int64_t bytes) { std::memset(memory, 0, static_cast<std::size_t>(bytes)); }

  void* allocate(std::int64_t bytes) { return memory_.emplace_back(static_cast<std::size_t>(bytes)).data(); }

 private:
  unsigned seed_;
  std::deque<Poisoned> memory_;
};

}  // namespace fastgen::emulation
