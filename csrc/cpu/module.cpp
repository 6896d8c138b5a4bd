// The compiled CPU part: importing fastgen._C registers the kernels; it exports nothing to Python itself.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common.h"

namespace fastgen {
namespace {

std::int64_t cpu_isa() { return static_cast<std::int64_t>(current_isa()); }

std::int64_t best_cpu_isa() { return static_cast<std::int64_t>(best_isa()); }

std::int64_t force_cpu_isa(std::int64_t isa) {
  const std::int64_t previous = cpu_isa();
  force_isa(static_cast<Isa>(isa));
  return previous;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("best_cpu_isa", TORCH_BOX(&best_cpu_isa));
  m.impl("force_cpu_isa", TORCH_BOX(&force_cpu_isa));
}

}  // namespace fastgen

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
