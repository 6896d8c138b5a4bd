// Elementary functions on vectors, for one instruction set. Read once per instruction set, after simd.h.
// float: polynomials, maximum errors between 1.5 and 3.5 ulp (tests/test_vmath.py); double: libm lane by lane.
// Polynomial coefficients are the single precision ones of the Cephes library (S. Moshier).

namespace fastgen::FASTGEN_ISA_NS {

// x = n * log(2) + r with |r| <= log(2) / 2, and exp(r) = 1 + r + r^2 * p.
struct ExpTerms {
  Vec<float> n, r, p;
};

FASTGEN_INLINE ExpTerms exp_terms(Vec<float> x) {
  using V = Vec<float>;
  // In this order of arguments min and max keep NaN.
  const V clamped = min(V(89.0f), max(V(-104.0f), x));
  const V n = round(clamped * V(1.44269504088896341f));
  V r = fnma(n, V(0.693359375f), clamped);
  r = fnma(n, V(-2.12194440e-4f), r);
  V p = V(1.9875691500e-4f);
  p = fma(p, r, V(1.3981999507e-3f));
  p = fma(p, r, V(8.3334519073e-3f));
  p = fma(p, r, V(4.1665795894e-2f));
  p = fma(p, r, V(1.6666665459e-1f));
  p = fma(p, r, V(5.0000001201e-1f));
  return {n, r, p};
}

FASTGEN_INLINE Vec<float> exp(const ExpTerms& t) {
  return scale2(fma(t.p, t.r * t.r, t.r) + Vec<float>(1.0f), t.n);
}
inline Vec<float> exp(Vec<float> x) { return exp(exp_terms(x)); }

// exp(x), exp(x) - 1 and exp(x) - 1 - x, without cancellation near zero.
template <class T>
struct ExpExcess {
  Vec<T> exp, expm1, excess;
};

FASTGEN_INLINE ExpExcess<float> exp_excess(Vec<float> x) {
  using V = Vec<float>;
  const ExpTerms t = exp_terms(x);
  const V square = t.r * t.r, near = fma(t.p, square, t.r);
  const V e = scale2(near + V(1.0f), t.n), far = e - V(1.0f);
  const Mask<float> unscaled = t.n == V(0.0f);
  return {e, select(unscaled, near, far), select(unscaled, t.p * square, far - x)};
}

inline Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  // Subnormals are scaled into the normal range first.
  const Mask<float> tiny = x < V(1.17549435e-38f);
  const V scaled = select(tiny, x * V(8388608.0f), x);
  const Words u = bits(scaled);
  V e = int_to_float(u.shr<23>() - Words(126u)) - select(tiny, V(23.0f), V(0.0f));
  V m = as_float((u & Words(0x007fffffu)) | Words(0x3f000000u));
  const Mask<float> low = m < V(0.707106781186547524f);
  e = e - select(low, V(1.0f), V(0.0f));
  m = select(low, m + m, m) - V(1.0f);
  const V z = m * m;
  V p = V(7.0376836292e-2f);
  p = fma(p, m, V(-1.1514610310e-1f));
  p = fma(p, m, V(1.1676998740e-1f));
  p = fma(p, m, V(-1.2420140846e-1f));
  p = fma(p, m, V(1.4249322787e-1f));
  p = fma(p, m, V(-1.6668057665e-1f));
  p = fma(p, m, V(2.0000714765e-1f));
  p = fma(p, m, V(-2.4999993993e-1f));
  p = fma(p, m, V(3.3333331174e-1f));
  V y = p * m * z;
  y = fma(e, V(-2.12194440e-4f), y);
  y = fnma(V(0.5f), z, y);
  V r = fma(e, V(0.693359375f), m + y);
  const V inf = V(std::numeric_limits<float>::infinity());
  r = select(x == inf, inf, r);
  r = select(x == V(0.0f), -inf, r);
  r = select(x < V(0.0f), V(std::numeric_limits<float>::quiet_NaN()), r);
  return select(is_nan(x), x, r);
}

// log(1 + x) by Kahan's correction: exact where 1 + x rounds.
inline Vec<float> log1p(Vec<float> x) {
  using V = Vec<float>;
  const V u = x + V(1.0f);
  const V d = u - V(1.0f);
  const V inf = V(std::numeric_limits<float>::infinity());
  const V r = log(u) * (x / d);
  return select((d == V(0.0f)) | (u == inf), select(u == inf, u, x), r);
}

inline Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V a = abs(x);
  const V z = x * x;
  V p = V(-5.70498872745e-3f);
  p = fma(p, z, V(2.06390887954e-2f));
  p = fma(p, z, V(-5.37397155531e-2f));
  p = fma(p, z, V(1.33314422036e-1f));
  p = fma(p, z, V(-3.33332819422e-1f));
  const V small = fma(p * z, x, x);
  V large = V(1.0f) - V(2.0f) / (exp(a + a) + V(1.0f));
  large = select(x < V(0.0f), -large, large);
  return select(a < V(0.625f), small, select(is_nan(x), x, large));
}

inline Vec<float> atan(Vec<float> x) {
  using V = Vec<float>;
  const V a = abs(x);
  const Mask<float> big = V(2.414213562373095f) < a;
  const Mask<float> mid = (V(0.4142135623730950f) < a) & ~big;
  const V t = select(big, V(-1.0f) / a, select(mid, (a - V(1.0f)) / (a + V(1.0f)), a));
  const V base = select(big, V(1.5707963267948966f), select(mid, V(0.7853981633974483f), V(0.0f)));
  const V z = t * t;
  V p = V(8.05374449538e-2f);
  p = fma(p, z, V(-1.38776856032e-1f));
  p = fma(p, z, V(1.99777106478e-1f));
  p = fma(p, z, V(-3.33329491539e-1f));
  const V y = base + fma(p * z, t, t);
  return select(is_nan(x), x, select(x < V(0.0f), -y, y));
}

inline Vec<double> exp(Vec<double> x) {
  return map(x, [](double a) { return std::exp(a); });
}
inline ExpExcess<double> exp_excess(Vec<double> x) {
  const Vec<double> m = map(x, [](double a) { return std::expm1(a); });
  return {exp(x), m, m - x};
}
inline Vec<double> log(Vec<double> x) {
  return map(x, [](double a) { return std::log(a); });
}
inline Vec<double> log1p(Vec<double> x) {
  return map(x, [](double a) { return std::log1p(a); });
}
inline Vec<double> tanh(Vec<double> x) {
  return map(x, [](double a) { return std::tanh(a); });
}
inline Vec<double> atan(Vec<double> x) {
  return map(x, [](double a) { return std::atan(a); });
}

// 1 / (1 + exp(-x)), accurate on both sides.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

// log(1 + exp(x)) without overflow.
template <class T>
inline Vec<T> softplus(Vec<T> x) {
  const Vec<T> r = max(x, Vec<T>(T(0))) + log1p(exp(-abs(x)));
  return select(is_nan(x), x, r);
}

}  // namespace fastgen::FASTGEN_ISA_NS
