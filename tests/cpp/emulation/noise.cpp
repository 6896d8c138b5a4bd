// The kernels that make noise on the host emulator, for tests/cuda: arguments are addresses and sizes.

#include <pybind11/pybind11.h>

#include <string>

#include "cuda/normal.cuh"
#include "cuda/philox_words.cuh"
#include "cuda/reparam_kl.cuh"
#include "run.h"

namespace py = pybind11;
using namespace fastgen;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls f with a null pointer of the named element type.
template <class F>
void with_type(const std::string& dtype, F f) {
  if (dtype == "float32") return f(static_cast<float*>(nullptr));
  if (dtype == "float64") return f(static_cast<double*>(nullptr));
  if (dtype == "float16") return f(static_cast<__half*>(nullptr));
  if (dtype == "bfloat16") return f(static_cast<__nv_bfloat16*>(nullptr));
  throw py::value_error("dtype: " + dtype);
}

void words(Address key, std::int64_t count, Address out, unsigned seed) {
  emulation::Run run(seed);
  run(philox_words_kernel, dim3(static_cast<unsigned>((count + 1023) / 1024)), 256, 0, at<const std::int64_t>(key),
      count, at<std::int64_t>(out));
}

void normal(const std::string& dtype, Address key, std::int64_t count, Address out, unsigned seed) {
  emulation::Run run(seed);
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    normal_values(at<const std::int64_t>(key), count, at<S>(out), run);
  });
}

// Rows of a tensor: where the first begins, and elements from one to the next.
struct Rows {
  Address address;
  std::int64_t stride;
};

Rows rows(const py::object& given) {
  if (given.is_none()) return {0, 0};
  const auto pair = given.cast<std::pair<Address, std::int64_t>>();
  return {pair.first, pair.second};
}

void forward(const std::string& dtype, std::int64_t count, std::int64_t size, const py::object& mu,
             const py::object& logvar, const py::object& noise, Address key, Address z, Address kl,
             unsigned seed) {
  const Rows m = rows(mu), lv = rows(logvar), n = rows(noise);
  emulation::Run run(seed);
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const ReparamForward<S> args{at<const S>(m.address),
                                 at<const S>(lv.address),
                                 at<const S>(n.address),
                                 m.stride,
                                 lv.stride,
                                 n.stride,
                                 count,
                                 size,
                                 at<const std::int64_t>(key),
                                 at<S>(z),
                                 at<acc_t<S>>(kl)};
    reparam_forward(args, run);
  });
}

void backward(const std::string& dtype, std::int64_t count, std::int64_t size, const py::object& grad_z,
              Address grad_kl, const py::object& mu, const py::object& logvar, const py::object& noise,
              Address key, Address grad_mu, Address grad_logvar, Address grad_noise, unsigned seed) {
  const Rows gz = rows(grad_z), m = rows(mu), lv = rows(logvar), n = rows(noise);
  emulation::Run run(seed);
  with_type(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const ReparamBackward<S> args{at<const S>(gz.address),
                                  at<const acc_t<S>>(grad_kl),
                                  at<const S>(m.address),
                                  at<const S>(lv.address),
                                  at<const S>(n.address),
                                  gz.stride,
                                  m.stride,
                                  lv.stride,
                                  n.stride,
                                  count,
                                  size,
                                  at<const std::int64_t>(key),
                                  at<S>(grad_mu),
                                  at<S>(grad_logvar),
                                  at<S>(grad_noise)};
    reparam_backward(args, run);
  });
}

}  // namespace

PYBIND11_MODULE(noise, m) {
  m.def("words", &words);
  m.def("normal", &normal);
  m.def("forward", &forward);
  m.def("backward", &backward);
}
