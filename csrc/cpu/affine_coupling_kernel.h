// Affine coupling over a range of pieces, for one instruction set.

#include "row_sums.h"

namespace fastgen::FASTGEN_ISA_NS {

constexpr std::int64_t kLongestPiece = std::max(kPiece, kRowBlock);

// log s, d(log s)/d(raw), and what x is multiplied by: s, or 1 / s for the inverse.
template <class T>
struct ScaleTerms {
  Vec<T> log_scale, slope, multiplier;
};

// min_scale = whole + beyond, whole being 0 or 1, whichever is closer.
template <class T>
struct ScaleOptions {
  T factor, min_scale, whole, beyond;
  ScaleOptions(double factor, double min_scale)
      : factor(static_cast<T>(factor)),
        min_scale(static_cast<T>(min_scale)),
        whole(min_scale < 0.5 ? T(0) : T(1)),
        beyond(static_cast<T>(min_scale - whole)) {}
};

// log(whole + rest) for a sum rounded to `sum`, whole being 0 or 1: what the sum of 1 and a small rest has no room
// for is most of its logarithm.
template <class T>
FASTGEN_INLINE Vec<T> log_sum(Vec<T> sum, Vec<T> whole, Vec<T> rest) {
  const Vec<T> lost = rest - (sum - whole);
  return log(sum) + select(rest < Vec<T>(T(1)), lost, Vec<T>(T(0)));
}

// With e = exp(-|a|): log sigmoid(a) = min(a, 0) - log(1 + e); log(sigmoid(a)) would underflow for a < -88.
template <bool kInverse, class T>
FASTGEN_INLINE ScaleTerms<T> sigmoid_terms(Vec<T> raw) {
  using V = Vec<T>;
  const V one = V(T(1)), zero = V(T(0)), a = raw + V(T(2)), e = exp(-abs(a));
  const Mask<T> negative = a < zero;
  const V over = select(negative, e, one), under = one + e;
  return {min(a, zero) - log1p_unit(e), select(negative, one, e) / under, kInverse ? under / over : over / under};
}

template <bool kInverse, class T>
FASTGEN_INLINE ScaleTerms<T> raised_sigmoid_terms(Vec<T> raw, const ScaleOptions<T>& options) {
  using V = Vec<T>;
  const V one = V(T(1)), a = raw + V(T(2)), e = exp(-abs(a));
  const V larger = one / (one + e), smaller = e * larger;
  const Mask<T> negative = a < V(T(0));
  const V whole = select(negative, V(options.whole), one);
  const V rest = select(negative, V(options.beyond) + smaller, V(options.min_scale) - smaller);
  const V s = whole + rest, inverse = one / s;
  return {log_sum(s, whole, rest), larger * smaller * inverse, kInverse ? inverse : s};
}

// Without a floor log softplus(a) is a as far as rounding goes below -40, long before softplus underflows.
template <bool kInverse, class T>
FASTGEN_INLINE ScaleTerms<T> softplus_terms(Vec<T> raw, const ScaleOptions<T>& options) {
  using V = Vec<T>;
  const V one = V(T(1)), zero = V(T(0)), e = exp(-abs(raw)), whole = V(options.whole);
  const V rest = V(options.beyond) + (max(raw, zero) + log1p_unit(e));
  const V s = whole + rest, over = select(raw < zero, e, one);
  const Mask<T> linear = raw < V(options.min_scale == T(0) ? T(-40) : -std::numeric_limits<T>::infinity());
  return {select(linear, raw, log_sum(s, whole, rest)), select(linear, one, over / ((one + e) * s)),
          kInverse ? one / s : s};
}

template <CouplingScale kScale, bool kInverse, class T>
FASTGEN_INLINE ScaleTerms<T> scale_terms(Vec<T> raw, const ScaleOptions<T>& options) {
  using V = Vec<T>;
  if constexpr (kScale == CouplingScale::kSigmoid) {
    return sigmoid_terms<kInverse>(raw);
  } else if constexpr (kScale == CouplingScale::kRaisedSigmoid) {
    return raised_sigmoid_terms<kInverse>(raw, options);
  } else if constexpr (kScale == CouplingScale::kSoftplus) {
    return softplus_terms<kInverse>(raw, options);
  } else {
    V log_scale = raw, slope = V(T(1));
    if constexpr (kScale == CouplingScale::kTanh) {
      const TanhTerms<T> t = tanh_terms(raw);
      log_scale = V(options.factor) * t.tanh;
      slope = V(options.factor) * t.slope;
    } else if constexpr (kScale == CouplingScale::kAtan) {
      const T scaled = options.factor * T(0.63661977236758134308);
      log_scale = V(scaled) * atan(raw);
      slope = V(scaled) / fma(raw, raw, V(T(1)));
    }
    return {log_scale, slope, exp(kInverse ? -log_scale : log_scale)};
  }
}

// n elements; gives log s to the sink, from element `at` on.
template <CouplingScale kScale, bool kInverse, class S, class Sink>
void coupling_run(const S* x, const S* raw, const S* shift, S* y, std::int64_t n,
                  const ScaleOptions<acc_t<S>>& options, const Sink& sink) {
  using V = Vec<acc_t<S>>;
  V log_scale;
  const auto step = [&](V x, V raw, V shift) FASTGEN_INLINE_LAMBDA {
    const auto terms = scale_terms<kScale, kInverse>(raw, options);
    log_scale = terms.log_scale;
    return kInverse ? (x - shift) * terms.multiplier : fma(x, terms.multiplier, shift);
  };
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    store(y + j, step(load(x + j), load(raw + j), load(shift + j)));
    sink(j, log_scale);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    store_n(y + j, step(load_n(x + j, rest), load_n(raw + j, rest), load_n(shift + j, rest)), rest);
    sink.tail(j, log_scale, rest);
  }
}

// The parameters of a piece side by side: where they lie, or in the buffer.
template <class S>
const S* side_by_side(const Parameters<S>& p, const Piece& piece, S* buffer) {
  const S* row = p.data + piece.row * p.stride;
  if (!p.paired) return row + piece.first;
  row += 2 * piece.first;
  for (std::int64_t i = 0; i < piece.last - piece.first; ++i) buffer[i] = row[2 * i];
  return buffer;
}

template <CouplingScale kScale, bool kInverse, class S>
void coupling_forward_pieces(const CouplingForward<S>& a, std::int64_t begin, std::int64_t end) {
  using T = acc_t<S>;
  const T sign = T(kInverse ? -1 : 1);
  const ScaleOptions<T> options(a.factor, a.min_scale);
  each_row_sum(begin, end, a.size, a.dense, sign, a.partial, [&](const Piece& piece, const auto& sink) {
    alignas(64) S raw[kLongestPiece], shift[kLongestPiece];
    coupling_run<kScale, kInverse>(a.x + piece.row * a.x_stride + piece.first, side_by_side(a.raw, piece, raw),
                                   side_by_side(a.shift, piece, shift), a.y + piece.row * a.size + piece.first,
                                   piece.last - piece.first, options, sink);
  });
}

template <CouplingScale kScale, bool kInverse, class S, class Value>
void coupling_grad_run(const CouplingBackward<S>& a, const Piece& piece, const Value& grad_log_det) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const ScaleOptions<T> options(a.factor, a.min_scale);
  alignas(64) S raw_buffer[kLongestPiece], shift_buffer[kLongestPiece];
  const S* gy = a.grad_y + piece.row * a.grad_y_stride + piece.first;
  const S* x = a.x + piece.row * a.x_stride + piece.first;
  const S* raw = side_by_side(a.raw, piece, raw_buffer);
  const S* shift = kInverse ? side_by_side(a.shift, piece, shift_buffer) : x;
  const std::int64_t out = piece.row * a.size + piece.first, n = piece.last - piece.first;
  S *grad_x = a.grad_x + out, *grad_raw = a.grad_raw + out;
  V gx, gr;
  const auto step = [&](V gy, V gld, V x, V raw, V shift) FASTGEN_INLINE_LAMBDA {
    const auto terms = scale_terms<kScale, kInverse>(raw, options);
    gx = gy * terms.multiplier;
    gr = kInverse ? -terms.slope * fma(gx, x - shift, gld) : terms.slope * fma(gx, x, gld);
  };
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    step(load(gy + j), grad_log_det(j), load(x + j), load(raw + j), load(shift + j));
    store(grad_x + j, gx);
    store(grad_raw + j, gr);
    if constexpr (kInverse) store(a.grad_shift + out + j, -gx);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    step(load_n(gy + j, rest), grad_log_det(j), load_n(x + j, rest), load_n(raw + j, rest),
         load_n(shift + j, rest));
    store_n(grad_x + j, gx, rest);
    store_n(grad_raw + j, gr, rest);
    if constexpr (kInverse) store_n(a.grad_shift + out + j, -gx, rest);
  }
}

template <CouplingScale kScale, bool kInverse, class S>
void coupling_backward_pieces(const CouplingBackward<S>& a, std::int64_t begin, std::int64_t end) {
  each_row_value(begin, end, a.size, a.dense, a.grad_log_det, [&](const Piece& piece, const auto& grad_log_det) {
    coupling_grad_run<kScale, kInverse>(a, piece, grad_log_det);
  });
}

// The run-time choices become template arguments once per range, outside the loops.
template <class S>
void coupling_forward(const CouplingForward<S>& a, std::int64_t begin, std::int64_t end) {
  dispatch_coupling(a.scale, a.inverse,
                    [&](auto scale, auto inverse) { coupling_forward_pieces<scale(), inverse()>(a, begin, end); });
}

template <class S>
void coupling_backward(const CouplingBackward<S>& a, std::int64_t begin, std::int64_t end) {
  dispatch_coupling(a.scale, a.inverse, [&](auto scale, auto inverse) {
    coupling_backward_pieces<scale(), inverse()>(a, begin, end);
  });
}

}  // namespace fastgen::FASTGEN_ISA_NS
