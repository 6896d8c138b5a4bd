// Runs the noise kernels over buffers that end where their tensors do, for the sanitizers:
// tests/cuda/test_noise_emulated.py.

#include <cstdio>
#include <vector>

#include "cuda/normal.cuh"
#include "cuda/reparam_kl.cuh"
#include "run.h"

using namespace fastgen;

namespace {

const std::vector<std::int64_t> kKey{7, -3};

// `count` elements on a multiple of 16 bytes, or one element after it.
template <class S>
class Buffer {
 public:
  Buffer(std::int64_t count, bool misaligned)
      : shift_(misaligned ? 1 : 0), memory_((static_cast<std::size_t>(count) + shift_) * sizeof(S)) {
    for (std::int64_t i = 0; i < count; ++i) narrow(static_cast<acc_t<S>>(i % 7 - 3), &data()[i]);
  }
  S* data() { return static_cast<S*>(memory_.data()) + shift_; }

 private:
  std::size_t shift_;
  emulation::Poisoned memory_;
};

template <class S>
void run_all(std::int64_t rows, std::int64_t size, bool makes_noise, bool misaligned) {
  using T = acc_t<S>;
  emulation::Run run(1);
  const std::int64_t count = rows * size;
  Buffer<S> mu(count, misaligned), logvar(count, false), noise(count, false), grad_z(count, false);
  Buffer<S> z(count, false), grad_mu(count, false), grad_logvar(count, false), grad_noise(count, false);
  Buffer<T> kl(rows, false);
  const S* given = makes_noise ? nullptr : noise.data();
  const std::int64_t* key = makes_noise ? kKey.data() : nullptr;
  reparam_forward(
      ReparamForward<S>{mu.data(), logvar.data(), given, size, size, size, rows, size, key, z.data(), kl.data()},
      run);
  reparam_backward(
      ReparamBackward<S>{grad_z.data(), kl.data(), mu.data(), logvar.data(), given, size, size, size, size, rows,
                         size, key, grad_mu.data(), grad_logvar.data(), makes_noise ? nullptr : grad_noise.data()},
      run);
  normal_values(kKey.data(), count, z.data(), run);
}

}  // namespace

int main() {
  for (const bool makes_noise : {false, true}) {
    run_all<float>(1, 1028, makes_noise, !makes_noise);
    run_all<__nv_bfloat16>(1, kPiece + 8, makes_noise, makes_noise);
  }
  return 0;
}
