// Rational-quadratic spline over a range of elements, one element a lane, for one instruction set.
// Names follow Durkan et al. 2019: theta is the position inside the bin, s its slope, d0 and d1 the derivatives at
// its ends; phi = 1 - theta.

#include "columns.h"
#include "row_sums.h"

namespace fastgen::FASTGEN_ISA_NS {

// Shares of the bound, and gradients, are kept in a range in which products of a few of them do not overflow.
template <class T>
constexpr T kLeastShare = sizeof(T) == 4 ? T(0x1p-40) : T(0x1p-200);
template <class T>
constexpr T kLargestGradient = sizeof(T) == 4 ? T(0x1p80) : T(0x1p500);

// Options in the arithmetic type. A bin is `low + scale * p` wide, p the softmax of the raw parameter; rounded
// knots that lie closer than `least` stand for a bin of that size.
template <class T>
struct SplineConstants {
  T bound, width_low, width_scale, width_least, height_low, height_scale, height_least, min_derivative,
      derivative_shift;

  SplineConstants(const SplineOptions& o, std::int64_t bins)
      : bound(T(o.tail_bound)),
        width_low(T(2 * o.tail_bound * o.min_bin_width)),
        width_scale(T(2 * o.tail_bound * (1 - o.min_bin_width * double(bins)))),
        width_least(T(o.tail_bound * std::max(o.min_bin_width, double(kLeastShare<T>)))),
        height_low(T(2 * o.tail_bound * o.min_bin_height)),
        height_scale(T(2 * o.tail_bound * (1 - o.min_bin_height * double(bins)))),
        height_least(T(o.tail_bound * std::max(o.min_bin_height, double(kLeastShare<T>)))),
        min_derivative(T(o.min_derivative)),
        derivative_shift(T(std::log(std::expm1(1 - o.min_derivative)))) {}
};

// The bin that holds each element, number `index`: its ends and the raw parameters of the derivatives there.
template <class T>
struct SplineBin {
  Vec<T> x0, x1, y0, y1, raw0, raw1, index;
};

// A running sum with Kahan's compensation: the last of many knots is as exact as the first.
template <class T>
struct ExactSum {
  Vec<T> value, lost;
};

template <class T>
FASTGEN_INLINE void add(ExactSum<T>& sum, Vec<T> term) {
  const Vec<T> exact = term - sum.lost, next = sum.value + exact;
  sum.lost = (next - sum.value) - exact;
  sum.value = next;
}

// The sizes of the bins along one axis: low + scale * softmax. `numerators` are the softmax's, as columns, and
// `factor` + `factor_rest` is scale / sum: in one number, its rounding would move every knot.
template <class T>
struct BinSizes {
  T* numerators;
  Vec<T> inverse_sum, factor, factor_rest;
  T scale, low;
};

// `columns` holds the raw parameters and becomes the numerators.
template <class T, class K>
FASTGEN_INLINE BinSizes<T> softmax_sizes(T* columns, K bins, T scale, T low) {
  using V = Vec<T>;
  ExactSum<T> sum{V(T(0)), V(T(0))};
  V top = V::load(columns);
  for (std::int64_t k = 1; k < bins; ++k) top = max(top, V::load(columns + k * V::width));
  for (std::int64_t k = 0; k < bins; ++k) {
    const V e = exp(V::load(columns + k * V::width) - top);
    e.store(columns + k * V::width);
    add(sum, e);
  }
  const V inverse = V(T(1)) / sum.value, factor = V(scale) * inverse;
  const V rest = fma(factor, sum.lost, fnma(factor, sum.value, V(scale))) * inverse;
  return {columns, inverse, factor, rest, scale, low};
}

template <class T>
FASTGEN_INLINE Vec<T> bin_size(const BinSizes<T>& sizes, std::int64_t k) {
  const Vec<T> e = Vec<T>::load(sizes.numerators + k * Vec<T>::width);
  return fma(e, sizes.factor, fma(e, sizes.factor_rest, Vec<T>(sizes.low)));
}

// A spline at one vector of elements.
template <class T, class K>
struct SplineColumns {
  K bins;
  BinSizes<T> widths, heights;
  T* derivatives;
};

template <bool kInverse, class T, class K>
FASTGEN_INLINE SplineBin<T> find_bin(const SplineConstants<T>& c, const SplineColumns<T, K>& p, Vec<T> v) {
  using V = Vec<T>;
  const V start = V(-c.bound), end = V(c.bound), zero = V(T(0));
  // The upper end of the box belongs to the last bin, even where rounded knots reach it before.
  const V reach = select(v < end, v, V(std::numeric_limits<T>::infinity()));
  ExactSum<T> x{start, zero}, y{start, zero};
  const auto walk = [&](std::int64_t k) FASTGEN_INLINE_LAMBDA {
    if (k == p.bins - 1) {
      x.value = y.value = end;
    } else {
      add(x, bin_size(p.widths, k));
      add(y, bin_size(p.heights, k));
    }
    return k == p.bins - 1 ? zero : V::load(p.derivatives + k * V::width);
  };
  SplineBin<T> bin;
  bin.x0 = bin.y0 = start;
  bin.index = bin.raw0 = zero;
  bin.raw1 = walk(0);
  bin.x1 = x.value;
  bin.y1 = y.value;
  V raw = bin.raw1;
  for (std::int64_t k = 1; k < p.bins; ++k) {
    const Mask<T> past = (kInverse ? y.value : x.value) <= reach;
    bin.index = select(past, V(T(k)), bin.index);
    bin.x0 = select(past, x.value, bin.x0);
    bin.y0 = select(past, y.value, bin.y0);
    bin.raw0 = select(past, raw, bin.raw0);
    raw = walk(k);
    bin.x1 = select(past, x.value, bin.x1);
    bin.y1 = select(past, y.value, bin.y1);
    bin.raw1 = select(past, raw, bin.raw1);
  }
  return bin;
}

// The spline inside its bin. With E = s (theta^2 + phi^2) + (d0 + d1) theta phi and q = d1 theta^2 + 2 s theta phi
// + d0 phi^2: y = y0 + h (s theta^2 + d0 theta phi) / E and dy/dx = s^2 q / E^2. Every term is positive.
template <class T>
struct SplinePoint {
  Mask<T> narrow, low;  // Whose width, whose height is the least one.
  Vec<T> width, height, inverse_width, s, d0, d1, theta, phi, product, squares, inverse_E, ratio, q, value;
};

// theta and phi where y is known. Durkan et al. solve a quadratic whose discriminant is the sum of squares below;
// of the two equal forms of the root, each lane takes the one that adds positive numbers only.
template <class T>
FASTGEN_INLINE void invert_bin(SplinePoint<T>& at, Vec<T> eta, Vec<T> rest) {
  using V = Vec<T>;
  const V p = at.d0 * rest - at.d1 * eta;
  const V two_s = at.s + at.s;
  const V root = sqrt(fma(p, p, two_s * two_s * (eta * rest)));
  const V q = root + abs(p);
  const Mask<T> falls = p < V(T(0));
  const V left = select(falls, q, two_s * eta), right = select(falls, two_s * rest, q);
  const V scale = V(T(1)) / (left + right);
  at.theta = left * scale;
  at.phi = right * scale;
}

template <bool kInverse, class T>
FASTGEN_INLINE SplinePoint<T> evaluate(const SplineConstants<T>& c, const SplineBin<T>& bin, Vec<T> v) {
  using V = Vec<T>;
  const V one = V(T(1));
  SplinePoint<T> at;
  // Only minima far below the rounding error of a knot let two of them meet.
  const V between_x = bin.x1 - bin.x0, between_y = bin.y1 - bin.y0;
  at.width = max(V(c.width_least), between_x);
  at.height = max(V(c.height_least), between_y);
  at.narrow = between_x < at.width;
  at.low = between_y < at.height;
  at.inverse_width = one / at.width;
  at.s = at.height * at.inverse_width;
  at.d0 = V(c.min_derivative) + softplus(bin.raw0 + V(c.derivative_shift));
  at.d1 = V(c.min_derivative) + softplus(bin.raw1 + V(c.derivative_shift));
  if constexpr (kInverse) {
    const V inverse_height = one / at.height;
    const V rest = (bin.y1 - v) * inverse_height;
    invert_bin(at, select(at.low, one - rest, (v - bin.y0) * inverse_height), rest);
  } else {
    at.phi = (bin.x1 - v) * at.inverse_width;
    at.theta = select(at.narrow, one - at.phi, (v - bin.x0) * at.inverse_width);
  }
  at.product = at.theta * at.phi;
  at.squares = fma(at.theta, at.theta, at.phi * at.phi);
  at.inverse_E = one / fma(at.s, at.squares, (at.d0 + at.d1) * at.product);
  at.ratio = at.theta * fma(at.s, at.theta, at.d0 * at.phi) * at.inverse_E;
  at.q = fma(at.d1, at.theta * at.theta, fma(at.s + at.s, at.product, at.d0 * at.phi * at.phi));
  const V value = kInverse ? fma(at.width, at.theta, bin.x0) : fma(at.height, at.ratio, bin.y0);
  at.value = min(min(V(c.bound), kInverse ? bin.x1 : bin.y1), value);
  return at;
}

template <class T>
FASTGEN_INLINE Vec<T> log_slope(const SplinePoint<T>& at) {
  const Vec<T> half = log(at.s * at.inverse_E);
  return log(at.q) + (half + half);
}

template <class S, class K>
FASTGEN_INLINE SplineColumns<acc_t<S>, K> load_spline(const SplineInputs<S>& a, const SplineConstants<acc_t<S>>& c,
                                                      K bins, std::int64_t i, int n, acc_t<S>* columns) {
  using T = acc_t<S>;
  using V = Vec<T>;
  T *widths = columns, *heights = widths + bins * V::width, *derivatives = heights + bins * V::width;
  load_columns(a.widths + i * a.widths_stride, a.widths_stride, bins, n, widths);
  load_columns(a.heights + i * a.heights_stride, a.heights_stride, bins, n, heights);
  load_columns(a.derivatives + i * a.derivatives_stride, a.derivatives_stride, bins - 1, n, derivatives);
  return {bins, softmax_sizes(widths, bins, c.width_scale, c.width_low),
          softmax_sizes(heights, bins, c.height_scale, c.height_low), derivatives};
}

template <class T>
FASTGEN_INLINE Mask<T> outside_box(const SplineConstants<T>& c, Vec<T> v) {
  return (v < Vec<T>(-c.bound)) | (Vec<T>(c.bound) < v);
}

template <bool kInverse, class S, class K>
void spline_forward_range(const SplineInputs<S>& a, std::int64_t begin, std::int64_t end, S* y, acc_t<S>* log_det,
                          acc_t<S>* columns, K bins) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const SplineConstants<T> c(a.options, bins);
  for (std::int64_t i = begin; i < end; i += V::width) {
    const int n = end - i < V::width ? static_cast<int>(end - i) : V::width;
    const auto p = load_spline(a, c, bins, i, n, columns);
    const V v = load_n(a.x + i, n);
    const Mask<T> outside = outside_box(c, v);
    // Tails take a harmless point through the maths; NaN stays.
    const V safe = select(outside, V(T(0)), v);
    const auto at = evaluate<kInverse>(c, find_bin<kInverse>(c, p, safe), safe);
    const V slope = log_slope(at);
    store_n(y + i, select(outside, v, at.value), n);
    store_n(log_det + i - begin, select(outside, V(T(0)), kInverse ? -slope : slope), n);
  }
}

// Gradients with respect to the input, the lower corner of the bin, its size and the two raw derivatives.
template <class T>
struct SplineBinGradients {
  Vec<T> v, x0, width, y0, height, raw0, raw1;
};

// `gy` and `gl` are the gradients of value and log-determinant. The inverse x of y = f(x, p) has
// dx = (dy - f_p dp) / f', so its gradient is that of f with -gx / f' for gy and the log-determinant's sign
// turned.
template <bool kInverse, class T>
FASTGEN_INLINE SplineBinGradients<T> differentiate(const SplineConstants<T>& c, const SplineBin<T>& bin,
                                                   const SplinePoint<T>& at, Vec<T> gy, Vec<T> gl) {
  using V = Vec<T>;
  const V one = V(T(1)), two = V(T(2));
  const V largest = V(kLargestGradient<T>);
  const V inverse_width = at.inverse_width, inverse_s = at.width / at.height, inverse_q = min(largest, one / at.q);
  const V inverse_E = at.inverse_E, inverse_E2 = inverse_E * inverse_E;
  const V theta2 = at.theta * at.theta, phi2 = at.phi * at.phi, skew = at.phi - at.theta, sum = at.d0 + at.d1;
  const V log_theta = two * (fma(at.d1, at.theta, fma(at.s, skew, -(at.d0 * at.phi))) * inverse_q -
                             skew * (sum - two * at.s) * inverse_E);
  const V twice = two * at.product, log_both = twice * inverse_E;
  const V log_s = fma(sum * log_both, inverse_s, twice * inverse_q);
  const auto limit = [largest](V a) FASTGEN_INLINE_LAMBDA { return min(largest, max(-largest, a)); };
  SplineBinGradients<T> g;
  if constexpr (kInverse) {
    g.x0 = gy;
    gl = -gl;
    const V scale = inverse_s / inverse_E;
    g.v = limit(fma(gl * log_theta, inverse_width, gy) * (scale * (scale * inverse_q)));
    gy = -g.v;
  }
  const V gr = gy * at.height * inverse_E2, gr_product = gr * at.product;
  const V g_s = fma(gl, log_s, gr_product * (at.d1 * theta2 - at.d0 * phi2));
  const V g_d0 = fma(gl, phi2 * inverse_q - log_both, gr_product * at.phi * fma(at.s, at.phi, at.d1 * at.theta));
  const V g_d1 =
      fma(gl, theta2 * inverse_q - log_both, -(gr_product * at.theta * fma(at.s, at.theta, at.d0 * at.phi)));
  if constexpr (!kInverse) {
    g.v = limit(fma(gl, log_theta, gr * at.s * at.q) * inverse_width);
    g.x0 = -g.v;
  }
  g.y0 = gy;
  // A size that is the least one is a constant; of the axis of v it still moves the upper end.
  const V zero = V(T(0));
  g.width = select(at.narrow, kInverse ? zero : g.x0, fma(g.x0, at.theta, -(g_s * at.s * inverse_width)));
  g.height = select(at.low, kInverse ? gy : zero, fma(gy, at.ratio, g_s * inverse_width));
  g.raw0 = g_d0 * sigmoid(bin.raw0 + V(c.derivative_shift));
  g.raw1 = g_d1 * sigmoid(bin.raw1 + V(c.derivative_shift));
  return g;
}

// Gradient with respect to the raw sizes, in place over the numerators: a bin before the one that holds the
// element moves its lower end (gradient `start`), that one changes its size (`size`), later ones nothing.
template <class T, class K>
FASTGEN_INLINE void sizes_gradient(const BinSizes<T>& sizes, K bins, Vec<T> index, Vec<T> start, Vec<T> size) {
  using V = Vec<T>;
  const auto gradient = [&](std::int64_t k) {
    return select(V(T(k)) < index, start, select(V(T(k)) == index, size, V(T(0))));
  };
  V mean = V(T(0));
  for (std::int64_t k = 0; k < bins; ++k) {
    const V p = V::load(sizes.numerators + k * V::width) * sizes.inverse_sum;
    p.store(sizes.numerators + k * V::width);
    mean = fma(p, gradient(k), mean);
  }
  for (std::int64_t k = 0; k < bins; ++k) {
    const V p = V::load(sizes.numerators + k * V::width);
    (V(sizes.scale) * p * (gradient(k) - mean)).store(sizes.numerators + k * V::width);
  }
}

template <bool kInverse, class S, class K>
void spline_backward_range(const SplineInputs<S>& a, const SplineGradients<S>& out, std::int64_t begin,
                           std::int64_t end, const acc_t<S>* grad_log_det, acc_t<S>* columns, K bins) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const SplineConstants<T> c(a.options, bins);
  const V zero = V(T(0));
  for (std::int64_t i = begin; i < end; i += V::width) {
    const int n = end - i < V::width ? static_cast<int>(end - i) : V::width;
    const auto p = load_spline(a, c, bins, i, n, columns);
    const V v = load_n(a.x + i, n);
    const Mask<T> outside = outside_box(c, v);
    const V safe = select(outside, zero, v);
    const auto bin = find_bin<kInverse>(c, p, safe);
    const auto at = evaluate<kInverse>(c, bin, safe);
    const V whole_gy = load_n(out.grad_y + i, n);
    const V gy = select(outside, zero, whole_gy);
    const V gl = select(outside, zero, load_n(grad_log_det + i - begin, n));
    const auto g = differentiate<kInverse>(c, bin, at, gy, gl);
    sizes_gradient(p.widths, bins, bin.index, g.x0, g.width);
    sizes_gradient(p.heights, bins, bin.index, g.y0, g.height);
    for (std::int64_t k = 0; k < bins - 1; ++k) {
      const V end0 = select(V(T(k + 1)) == bin.index, g.raw0, zero);
      select(V(T(k)) == bin.index, g.raw1, end0).store(p.derivatives + k * V::width);
    }
    store_n(out.grad_x + i, select(outside, whole_gy, g.v), n);
    store_columns(out.grad_widths + i * bins, bins, bins, n, p.widths.numerators);
    store_columns(out.grad_heights + i * bins, bins, bins, n, p.heights.numerators);
    store_columns(out.grad_derivatives + i * (bins - 1), bins - 1, bins - 1, n, p.derivatives);
  }
}

// The common numbers of bins are compiled in.
template <class F>
void dispatch_spline(const SplineOptions& options, std::int64_t bins, F&& f) {
  const auto with = [&](auto inverse) {
    if (bins == 8) return f(inverse, std::integral_constant<std::int64_t, 8>{});
    return f(inverse, bins);
  };
  return options.inverse ? with(std::true_type{}) : with(std::false_type{});
}

template <class S>
void spline_forward(const SplineInputs<S>& a, std::int64_t begin, std::int64_t end, S* y, acc_t<S>* log_det,
                    acc_t<S>* columns) {
  dispatch_spline(a.options, a.bins, [&](auto inverse, auto bins) {
    spline_forward_range<inverse()>(a, begin, end, y, log_det, columns, bins);
  });
}

template <class S>
void spline_backward(const SplineInputs<S>& a, const SplineGradients<S>& out, std::int64_t begin, std::int64_t end,
                     const acc_t<S>* grad_log_det, acc_t<S>* columns) {
  dispatch_spline(a.options, a.bins, [&](auto inverse, auto bins) {
    spline_backward_range<inverse()>(a, out, begin, end, grad_log_det, columns, bins);
  });
}

}  // namespace fastgen::FASTGEN_ISA_NS
