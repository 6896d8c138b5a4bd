// cuda_probe: a copy of a tensor, to see that the CUDA build runs on this driver and GPU, and how fast memory is.

#include "launch.h"
#include "probe.cuh"

namespace fastgen {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 65536;

Tensor cuda_probe(const Tensor& x) {
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(in);
  const std::int64_t bytes = in.numel() * in.element_size();
  if (bytes == 0) return out;
  const auto* from = static_cast<const char*>(in.data_ptr());
  const bool aligned = reinterpret_cast<std::uintptr_t>(from) % sizeof(uint4) == 0;
  const std::int64_t vectors = aligned ? bytes / static_cast<std::int64_t>(sizeof(uint4)) : 0;
  const Launch launch(in);
  const std::int64_t blocks = std::clamp<std::int64_t>(bytes / (kThreads * sizeof(uint4)), 1, kMaxBlocks);
  probe_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(
      from, static_cast<char*>(out.data_ptr()), vectors, bytes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { m.impl("cuda_probe", TORCH_BOX(&cuda_probe)); }

}  // namespace fastgen
