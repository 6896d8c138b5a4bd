// The kernels of vector quantization over memory that ends where the tensors end, for the sanitizers; `vq_run
// small` runs only a few blocks. Exit status 1: an answer is wrong.

#include <cmath>
#include <cstdio>
#include <random>

#include "cuda/sum_by_code.cuh"
#include "cuda/vq_chain.cuh"
#include "cuda/vq_quantize.cuh"
#include "run.h"

using namespace fastgen;
using emulation::Poisoned;
using emulation::Run;

namespace {

template <class T>
struct Array {
  explicit Array(std::int64_t count) : memory(static_cast<std::size_t>(count) * sizeof(T)) {}
  T* data() const { return static_cast<T*>(memory.data()); }
  Poisoned memory;
};

template <class S>
std::int64_t nearest(const S* x, const S* codes, std::int64_t count, int size) {
  std::int64_t index = 0;
  double least = INFINITY;
  for (std::int64_t k = 0; k < count; ++k) {
    double key = 0;
    for (int j = 0; j < size; ++j) {
      const double difference = static_cast<double>(widen(x[j])) - static_cast<double>(widen(codes[k * size + j]));
      key += difference * difference;
    }
    if (key >= least) continue;
    least = key;
    index = k;
  }
  return index;
}

template <class S>
bool right(std::int64_t rows, std::int64_t codes, int size, bool hopper) {
  using T = acc_t<S>;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Array<S> x(rows * size), codebook(codes * size), quantized(rows * size), grad_x(rows * size),
      grad_codes(codes * size);
  Array<std::int64_t> indices(rows);
  Array<double> errors(rows);
  Array<T> loss(1);
  for (std::int64_t i = 0; i < rows * size; ++i) narrow(static_cast<T>(normal(random)), x.data() + i);
  for (std::int64_t i = 0; i < codes * size; ++i) narrow(static_cast<T>(normal(random)), codebook.data() + i);

  Run run(7);
  const vq::Device device{2, static_cast<int>(emulation::kSharedLimit), 1 << 20, hopper};
  vq::search<S>(run, device, x.data(), codebook.data(), {1, rows, codes, size}, false,
                {indices.data(), nullptr, quantized.data(), errors.data()});
  vq::sum_loss(run, errors.data(), rows, 1, loss.data());
  vq::grad_rows(run, vq::GradRows<S>{x.data(), x.data(), codebook.data(), indices.data(), rows, rows, codes, size,
                                     1, 1, loss.data(), grad_x.data()});
  vq::SumByCode<S, S> sums{};
  sums.x = x.data();
  sums.codes = codebook.data();
  sums.factor = 1;
  sums.scale = loss.data();
  sums.size = size;
  sums.out = grad_codes.data();
  vq::sum_by_code(run, indices.data(), 1, rows, codes, sums);

  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t expected = nearest(x.data() + r * size, codebook.data(), codes, size);
    if (indices.data()[r] == expected) continue;
    std::printf("%lld x %lld x %d: row %lld\n", static_cast<long long>(rows), static_cast<long long>(codes), size,
                static_cast<long long>(r));
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char**) {
  bool all = right<float>(5, 7, 20, false) && right<float>(5, 7, 20, true);
  if (argc > 1) return all ? 0 : 1;
  for (const bool hopper : {false, true}) {
    all = right<float>(70, 130, 5, hopper) && all;
    all = right<float>(33, 129, 64, hopper) && all;
    all = right<__half>(20, 7, 24, hopper) && all;
    all = right<double>(3, 200, 100, hopper) && all;
    all = right<__nv_bfloat16>(1, 1, 1, hopper) && all;
  }
  return all ? 0 : 1;
}
