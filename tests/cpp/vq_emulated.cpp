// The CUDA kernels of vector quantization on the host emulator. Tensors come as addresses.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/sum_by_code.cuh"
#include "cuda/vq_chain.cuh"
#include "cuda/vq_quantize.cuh"
#include "emulation/run.h"

namespace {

using fastgen::emulation::Run;
using namespace fastgen;

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// f(null pointer of the element type).
template <class F>
void of_type(const std::string& dtype, F f) {
  if (dtype == "float32") return f(static_cast<float*>(nullptr));
  if (dtype == "float64") return f(static_cast<double*>(nullptr));
  if (dtype == "float16") return f(static_cast<__half*>(nullptr));
  if (dtype == "bfloat16") return f(static_cast<__nv_bfloat16*>(nullptr));
  throw std::invalid_argument(dtype);
}

// shared_bytes, row_image_bytes: as of fastgen::vq::Device.
// Returns the number of open rows of the first head.
int search(const std::string& dtype, std::uintptr_t x, std::uintptr_t codes, std::array<std::int64_t, 4> sizes,
           bool cosine, bool hopper, int shared_bytes, std::int64_t row_image_bytes, unsigned seed,
           std::uintptr_t indices, std::uintptr_t distance, std::uintptr_t quantized, std::uintptr_t errors) {
  const vq::Device device{1, shared_bytes, row_image_bytes, hopper};
  Run run(seed);
  int open = 0;
  of_type(dtype, [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    const vq::Answers<S> answers{at<std::int64_t>(indices), at<acc_t<S>>(distance), at<S>(quantized),
                                 at<double>(errors)};
    const auto memory = vq::search<S>(run, device, at<S>(x), at<S>(codes),
                                      {sizes[0], sizes[1], sizes[2], sizes[3]}, cosine, answers);
    if (memory.open_count != nullptr) open = *memory.open_count;
  });
  return open;
}

// sizes: heads, rows, codes, size.
void stats(const std::string& dtype, std::uintptr_t x, std::uintptr_t indices, std::array<std::int64_t, 4> sizes,
           std::uintptr_t counts, std::uintptr_t sums) {
  Run run(0);
  of_type(dtype, [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    vq::SumByCode<S, acc_t<S>> a{};
    a.x = at<S>(x);
    a.factor = 1;
    a.size = static_cast<int>(sizes[3]);
    a.out = at<acc_t<S>>(sums);
    a.counts = at<acc_t<S>>(counts);
    vq::sum_by_code(run, at<std::int64_t>(indices), sizes[0], sizes[1], sizes[2], a);
  });
}

void loss(const std::string& dtype, std::uintptr_t errors, std::int64_t rows, double factor, std::uintptr_t out) {
  Run run(0);
  if (dtype == "float64")
    vq::sum_loss(run, at<double>(errors), rows, factor, at<double>(out));
  else
    vq::sum_loss(run, at<double>(errors), rows, factor, at<float>(out));
}

void backward(const std::string& dtype, std::uintptr_t grad, std::uintptr_t grad_loss, std::uintptr_t x,
              std::uintptr_t codes, std::uintptr_t indices, std::array<std::int64_t, 4> sizes, double factor_x,
              double factor_codes, std::uintptr_t grad_x, std::uintptr_t grad_codes) {
  Run run(0);
  of_type(dtype, [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    const auto [heads, rows, count, size] = sizes;
    vq::grad_rows(
        run, vq::GradRows<S>{at<S>(grad), at<S>(x), at<S>(codes), at<std::int64_t>(indices), heads * rows, rows,
                             count, static_cast<int>(size), 1, factor_x, at<acc_t<S>>(grad_loss), at<S>(grad_x)});
    vq::SumByCode<S, S> a{};
    a.x = at<S>(x);
    a.codes = at<S>(codes);
    a.factor = factor_codes;
    a.scale = at<acc_t<S>>(grad_loss);
    a.size = static_cast<int>(size);
    a.out = at<S>(grad_codes);
    vq::sum_by_code(run, at<std::int64_t>(indices), heads, rows, count, a);
  });
}

}  // namespace

PYBIND11_MODULE(vq_emulated, m) {
  m.def("search", &search);
  m.def("stats", &stats);
  m.def("loss", &loss);
  m.def("backward", &backward);
}
