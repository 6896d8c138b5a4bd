// Elementary functions on vectors, for one instruction set. Read once per instruction set, after simd.h.
// float: polynomials, maximum errors between 1.5 and 3.5 ulp (tests/test_vmath.py); double: libm lane by lane.
// Polynomial coefficients are the single precision ones of the Cephes library (S. Moshier); terms are added in
// pairs (Estrin), since one chain of multiply-adds would leave the units waiting.

namespace fastgen::FASTGEN_ISA_NS {

// x = n * log(2) + r with |r| <= log(2) / 2, exp(r) = 1 + r + r^2 * p, and shifted = n + kRoundingShift.
struct ExpTerms {
  Vec<float> n, shifted, r, p;
};

FASTGEN_INLINE ExpTerms exp_terms(Vec<float> x) {
  using V = Vec<float>;
  // In this order of arguments min and max keep NaN.
  const V clamped = min(V(89.0f), max(V(-104.0f), x));
  const V shifted = fma(clamped, V(1.44269504088896341f), V(kRoundingShift));
  const V n = shifted - V(kRoundingShift);
  V r = fnma(n, V(0.693359375f), clamped);
  r = fnma(n, V(-2.12194440e-4f), r);
  const V square = r * r;
  const V p01 = fma(V(1.6666665459e-1f), r, V(5.0000001201e-1f));
  const V p23 = fma(V(8.3334519073e-3f), r, V(4.1665795894e-2f));
  const V p45 = fma(V(1.9875691500e-4f), r, V(1.3981999507e-3f));
  const V p = fma(fma(p45, square, p23), square, p01);
  return {n, shifted, r, p};
}

FASTGEN_INLINE Vec<float> exp(const ExpTerms& t) {
  return scale2(fma(t.p, t.r * t.r, t.r) + Vec<float>(1.0f), t.n, t.shifted);
}
FASTGEN_INLINE Vec<float> exp(Vec<float> x) { return exp(exp_terms(x)); }

// exp(x), exp(x) - 1 and exp(x) - 1 - x, without cancellation near zero.
template <class T>
struct ExpExcess {
  Vec<T> exp, expm1, excess;
};

FASTGEN_INLINE ExpExcess<float> exp_excess(Vec<float> x) {
  using V = Vec<float>;
  const ExpTerms t = exp_terms(x);
  const V square = t.r * t.r, near = fma(t.p, square, t.r);
  const V e = scale2(near + V(1.0f), t.n, t.shifted), far = e - V(1.0f);
  const Mask<float> unscaled = t.n == V(0.0f);
  return {e, select(unscaled, near, far), select(unscaled, t.p * square, far - x)};
}

// e * log(2) + log(1 + t) for t in [sqrt(1/2) - 1, sqrt(2) - 1].
FASTGEN_INLINE Vec<float> log_terms(Vec<float> e, Vec<float> t) {
  using V = Vec<float>;
  const V z = t * t;
  const V p01 = fma(V(-2.4999993993e-1f), t, V(3.3333331174e-1f));
  const V p23 = fma(V(-1.6668057665e-1f), t, V(2.0000714765e-1f));
  const V p45 = fma(V(-1.2420140846e-1f), t, V(1.4249322787e-1f));
  const V p67 = fma(V(-1.1514610310e-1f), t, V(1.1676998740e-1f));
  const V fourth = z * z, p4 = fma(V(7.0376836292e-2f), fourth, fma(p67, z, p45));
  const V p = fma(p4, fourth, fma(p23, z, p01));
  V y = p * t * z;
  y = fma(e, V(-2.12194440e-4f), y);
  y = fnma(V(0.5f), z, y);
  return fma(e, V(0.693359375f), t + y);
}

// Kept out of line: next to none of a kernel's values are zero, subnormal, negative, infinite or NaN.
__attribute__((noinline)) inline Vec<float> log_each(Vec<float> x) {
  return map(x, [](float a) { return std::log(a); });
}

FASTGEN_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  const V m = fraction(x), e = exponent(x);
  const Mask<float> low = m < V(0.707106781186547524f);
  const V r = log_terms(select(low, e, e + V(1.0f)), select(low, m + m, m) - V(1.0f));
  const Mask<float> normal = (V(1.17549435e-38f) <= x) & (x < V(std::numeric_limits<float>::infinity()));
  return (~normal).any() ? select(normal, r, log_each(x)) : r;
}

// log(1 + x) for x in [0, 1] and NaN.
FASTGEN_INLINE Vec<float> log1p_unit(Vec<float> x) {
  using V = Vec<float>;
  const Mask<float> high = V(0.41421356237309504880f) < x;
  return log_terms(select(high, V(1.0f), V(0.0f)), select(high, fma(V(0.5f), x, V(-0.5f)), x));
}

// tanh(x) and its derivative 1 - tanh(x)^2, the latter without cancellation.
template <class T>
struct TanhTerms {
  Vec<T> tanh, slope;
};

FASTGEN_INLINE TanhTerms<float> tanh_terms(Vec<float> x) {
  using V = Vec<float>;
  // With e = exp(-2 |x|): tanh |x| = (1 - e) / (1 + e), and the derivative is 4 e / (1 + e)^2. Beyond 20 tanh
  // is 1.
  const ExpTerms t = exp_terms(min(V(20.0f), abs(x)) * V(-2.0f));
  const V power = as_float((bits(t.shifted) - Words(127u)).shl<23>());
  const V near = fma(t.p, t.r * t.r, t.r), m = fma(near, power, power - V(1.0f)), sum = m + V(2.0f);
  const V e = fma(near, power, power), half = V(2.0f) / sum;
  return {flip_sign(-m / sum, bits(x)), e * half * half};
}
FASTGEN_INLINE Vec<float> tanh(Vec<float> x) { return tanh_terms(x).tanh; }

FASTGEN_INLINE Vec<float> atan(Vec<float> x) {
  using V = Vec<float>;
  const V a = abs(x);
  const Mask<float> big = V(2.414213562373095f) < a;
  const Mask<float> mid = (V(0.4142135623730950f) < a) & ~big;
  const V over = select(big, V(-1.0f), select(mid, a - V(1.0f), a));
  const V under = select(big, a, select(mid, a + V(1.0f), V(1.0f)));
  const V t = over / under;
  const V base = select(big, V(1.5707963267948966f), select(mid, V(0.7853981633974483f), V(0.0f)));
  const V z = t * t;
  const V p01 = fma(V(1.99777106478e-1f), z, V(-3.33329491539e-1f));
  const V p23 = fma(V(8.05374449538e-2f), z, V(-1.38776856032e-1f));
  const V p = fma(p23, z * z, p01);
  return flip_sign(base + fma(p * z, t, t), bits(x));
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
inline Vec<double> log1p_unit(Vec<double> x) {
  return map(x, [](double a) { return std::log1p(a); });
}
inline Vec<double> tanh(Vec<double> x) {
  return map(x, [](double a) { return std::tanh(a); });
}
inline TanhTerms<double> tanh_terms(Vec<double> x) {
  const Vec<double> t = tanh(x);
  return {t, fnma(t, t, Vec<double>(1.0))};
}
inline Vec<double> atan(Vec<double> x) {
  return map(x, [](double a) { return std::atan(a); });
}

// 1 / (1 + exp(-x)), accurate on both sides.
template <class T>
FASTGEN_INLINE Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

// log(1 + exp(x)) without overflow.
template <class T>
FASTGEN_INLINE Vec<T> softplus(Vec<T> x) {
  return max(x, Vec<T>(T(0))) + log1p_unit(exp(-abs(x)));
}

}  // namespace fastgen::FASTGEN_ISA_NS
