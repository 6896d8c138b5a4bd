// Applies a function of vmath.h to an array, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

template <class F>
bool apply(const float* x, float* y, std::int64_t n, F f) {
  std::int64_t i = 0;
  for (; i + Vec<float>::width <= n; i += Vec<float>::width) store(y + i, f(load(x + i)));
  if (i < n) store_n(y + i, f(load_n(x + i, static_cast<int>(n - i))), static_cast<int>(n - i));
  return true;
}

inline bool evaluate(const char* name, const float* x, float* y, std::int64_t n) {
  using V = Vec<float>;
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("exp")) return apply(x, y, n, [](V a) { return exp(a); });
  if (is("expm1")) return apply(x, y, n, [](V a) { return exp_excess(a).expm1; });
  if (is("log")) return apply(x, y, n, [](V a) { return log(a); });
  if (is("tanh")) return apply(x, y, n, [](V a) { return tanh(a); });
  if (is("arctan")) return apply(x, y, n, [](V a) { return atan(a); });
  if (is("sigmoid")) return apply(x, y, n, [](V a) { return sigmoid(a); });
  if (is("softplus")) return apply(x, y, n, [](V a) { return softplus(a); });
  return false;
}

}  // namespace fastgen::FASTGEN_ISA_NS
