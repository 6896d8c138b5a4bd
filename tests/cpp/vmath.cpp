// Binds the vector functions of csrc/cpu/vmath.h for tests/test_vmath.py: f(name, isa, x) for float32 arrays.

#include "cpu/common.h"

#define FASTGEN_ISA_FILE "../../tests/cpp/vmath_kernel.h"
#include "cpu/foreach_isa.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cpu/isa.cpp"

namespace py = pybind11;

PYBIND11_MODULE(vmath, m) {
  m.def("evaluate", [](const std::string& name, int isa, py::array_t<float, py::array::c_style> x) {
    fastgen::force_isa(static_cast<fastgen::Isa>(isa));
    py::array_t<float> y(x.size());
    if (!FASTGEN_DISPATCH_ISA(evaluate, name.c_str(), x.data(), y.mutable_data(), x.size())) {
      throw py::value_error("unknown function " + name);
    }
    return y;
  });
}
