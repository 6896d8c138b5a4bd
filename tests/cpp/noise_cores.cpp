// Binds the scalar cores of csrc/common for tests/test_random.py; no tensors, no torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/box_muller.h"
#include "common/philox.h"

namespace py = pybind11;

namespace {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> k) {
  const fastgen::PhiloxWords w = fastgen::philox4x32({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
  return {w.w[0], w.w[1], w.w[2], w.w[3]};
}

std::array<std::uint32_t, 4> block(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) {
  const fastgen::PhiloxWords w = fastgen::philox_block({seed, offset}, index);
  return {w.w[0], w.w[1], w.w[2], w.w[3]};
}

template <class T>
py::tuple transform(py::array_t<std::uint32_t> radius, py::array_t<std::uint32_t> angle) {
  const py::ssize_t n = radius.size();
  py::array_t<T> even(n), odd(n);
  const std::uint32_t *r = radius.data(), *a = angle.data();
  T *e = even.mutable_data(), *o = odd.mutable_data();
  for (py::ssize_t i = 0; i < n; ++i) fastgen::box_muller(r[i], a[i], e + i, o + i);
  return py::make_tuple(even, odd);
}

// Over the radius words [first, last): the largest error in units in the last place against float64, the smallest and
// the largest radius, and the largest increase of the radius from a word to the next.
py::tuple sweep_radius(std::uint64_t first, std::uint64_t last) {
  py::gil_scoped_release release;
  double error = 0;
  float smallest = std::numeric_limits<float>::infinity(), largest = 0, increase = 0;
  float previous = std::numeric_limits<float>::infinity();
  for (std::uint64_t w = first; w < last; ++w) {
    const float r = fastgen::normal_radius(static_cast<std::uint32_t>(w));
    const double exact = std::sqrt(-2.0 * std::log((static_cast<double>(w) + 0.5) * 0x1p-32));
    const float ulp = std::nextafterf(r, 100.0f) - r;
    error = std::max(error, std::fabs(r - exact) / ulp);
    if (!(error < 1e9)) break;
    smallest = std::min(smallest, r);
    largest = std::max(largest, r);
    increase = std::max(increase, (r - previous) / ulp);
    previous = r;
  }
  py::gil_scoped_acquire acquire;
  return py::make_tuple(error, smallest, largest, increase);
}

}  // namespace

PYBIND11_MODULE(noise_cores, m) {
  m.def("philox", &philox);
  m.def("block", &block);
  m.def("box_muller", &transform<float>);
  m.def("box_muller_double", &transform<double>);
  m.def("sweep_radius", &sweep_radius);
}
