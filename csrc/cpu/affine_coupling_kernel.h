// Affine coupling over a range of pieces, for one instruction set.

#include "row_sums.h"

namespace fastgen::FASTGEN_ISA_NS {

// log s, d(log s)/d(raw), and what x is multiplied by: s, or 1 / s for the inverse.
template <class T>
struct ScaleTerms {
  Vec<T> log_scale, slope, multiplier;
};

template <CouplingScale kScale, bool kInverse, class T>
FASTGEN_INLINE ScaleTerms<T> scale_terms(Vec<T> raw, T factor) {
  using V = Vec<T>;
  const V one = V(T(1)), zero = V(T(0));
  if constexpr (kScale == CouplingScale::kSigmoid) {
    // With e = exp(-|a|): log sigmoid(a) = min(a, 0) - log(1 + e); log(sigmoid(a)) would underflow for a < -88.
    const V a = raw + V(T(2)), e = exp(-abs(a));
    const Mask<T> negative = a < zero;
    const V over = select(negative, e, one), under = one + e;
    return {min(a, zero) - log1p_unit(e), select(negative, one, e) / under,
            kInverse ? under / over : over / under};
  } else {
    V log_scale = raw, slope = one;
    if constexpr (kScale == CouplingScale::kTanh) {
      const TanhTerms<T> t = tanh_terms(raw);
      log_scale = V(factor) * t.tanh;
      slope = V(factor) * t.slope;
    } else if constexpr (kScale == CouplingScale::kAtan) {
      const T scaled = factor * T(0.63661977236758134308);
      log_scale = V(scaled) * atan(raw);
      slope = V(scaled) / fma(raw, raw, one);
    }
    return {log_scale, slope, exp(kInverse ? -log_scale : log_scale)};
  }
}

// n elements; gives log s to the sink, from element `at` on.
template <CouplingScale kScale, bool kInverse, class S, class Sink>
void coupling_run(const S* x, const S* raw, const S* shift, S* y, std::int64_t n, acc_t<S> factor,
                  const Sink& sink) {
  using V = Vec<acc_t<S>>;
  V log_scale;
  const auto step = [&](V x, V raw, V shift) FASTGEN_INLINE_LAMBDA {
    const auto terms = scale_terms<kScale, kInverse>(raw, factor);
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

template <CouplingScale kScale, bool kInverse, class S>
void coupling_forward_pieces(const CouplingForward<S>& a, std::int64_t begin, std::int64_t end) {
  using T = acc_t<S>;
  const T sign = T(kInverse ? -1 : 1);
  each_row_sum(begin, end, a.size, a.dense, sign, a.partial, [&](const Piece& piece, const auto& sink) {
    coupling_run<kScale, kInverse>(
        a.x + piece.row * a.x_stride + piece.first, a.raw + piece.row * a.raw_stride + piece.first,
        a.shift + piece.row * a.shift_stride + piece.first, a.y + piece.row * a.size + piece.first,
        piece.last - piece.first, static_cast<T>(a.factor), sink);
  });
}

template <CouplingScale kScale, bool kInverse, class S, class Value>
void coupling_grad_run(const CouplingBackward<S>& a, const Piece& piece, const Value& grad_log_det) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const T factor = static_cast<T>(a.factor);
  const S* gy = a.grad_y + piece.row * a.grad_y_stride;
  const S* x = a.x + piece.row * a.x_stride;
  const S* raw = a.raw + piece.row * a.raw_stride;
  const S* shift = a.shift + piece.row * a.shift_stride;
  const std::int64_t out = piece.row * a.size;
  S *grad_x = a.grad_x + out, *grad_raw = a.grad_raw + out;
  V gx, gr;
  const auto step = [&](V gy, V gld, V x, V raw, V shift) FASTGEN_INLINE_LAMBDA {
    const auto terms = scale_terms<kScale, kInverse>(raw, factor);
    gx = gy * terms.multiplier;
    gr = kInverse ? -terms.slope * fma(gx, x - shift, gld) : terms.slope * fma(gx, x, gld);
  };
  std::int64_t j = piece.first;
  for (; j + V::width <= piece.last; j += V::width) {
    step(load(gy + j), grad_log_det(j - piece.first), load(x + j), load(raw + j), load(shift + j));
    store(grad_x + j, gx);
    store(grad_raw + j, gr);
    if constexpr (kInverse) store(a.grad_shift + out + j, -gx);
  }
  if (j < piece.last) {
    const int rest = static_cast<int>(piece.last - j);
    step(load_n(gy + j, rest), grad_log_det(j - piece.first), load_n(x + j, rest), load_n(raw + j, rest),
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
