// The random words of a key of counter-based noise, on the GPU. The key stays on the device: nothing synchronises,
// and a CUDA graph replays with whatever the key holds then.

#include "philox_words.cuh"

#include "launch.h"

namespace fastgen {
namespace {

constexpr std::int64_t kThreads = 256;

Tensor philox_words(const Tensor& key, std::int64_t count) {
  STD_TORCH_CHECK(key.is_cuda() && key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2,
                  "philox_words: key has the wrong device, dtype or shape");
  const std::int64_t blocks = (count + 4 * kThreads - 1) / (4 * kThreads);
  STD_TORCH_CHECK(count >= 0 && blocks <= std::numeric_limits<std::int32_t>::max(),
                  "philox_words: count must be between 0 and 2^41");
  Tensor out = torch::stable::new_empty(key, {count}, ScalarType::Long);
  if (count == 0) return out;
  const Tensor dense = torch::stable::contiguous(key);
  const Launch launch(key);
  philox_words_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(
      data<const std::int64_t>(dense), count, data<std::int64_t>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { m.impl("philox_words", TORCH_BOX(&philox_words)); }

}  // namespace fastgen
