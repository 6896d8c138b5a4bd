// Affine coupling over a range of pieces, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

// log s and d(log s)/d(raw) of the scale function.
template <CouplingScale kScale, class T>
inline Vec<T> log_scale(Vec<T> raw, T factor, Vec<T>* slope) {
  using V = Vec<T>;
  const V one = V(T(1));
  if constexpr (kScale == CouplingScale::kExp) {
    *slope = one;
    return raw;
  } else if constexpr (kScale == CouplingScale::kTanh) {
    const V t = tanh(raw);
    *slope = V(factor) * fnma(t, t, one);
    return V(factor) * t;
  } else if constexpr (kScale == CouplingScale::kSigmoid) {
    // log sigmoid(a) = -softplus(-a): log(sigmoid(a)) underflows for a < -88.
    const V a = raw + V(T(2));
    *slope = sigmoid(-a);
    return -softplus(-a);
  } else {
    const T scaled = factor * T(0.63661977236758134308);
    *slope = V(scaled) / fma(raw, raw, one);
    return V(scaled) * atan(raw);
  }
}

template <CouplingScale kScale, bool kInverse, class S>
void coupling_forward_pieces(const CouplingForward<S>& a, std::int64_t begin, std::int64_t end) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const T factor = static_cast<T>(a.factor);
  const auto step = [&](V x, V raw, V shift, V* ls) {
    V slope;
    *ls = log_scale<kScale>(raw, factor, &slope);
    return kInverse ? (x - shift) * exp(-*ls) : fma(x, exp(*ls), shift);
  };
  for (std::int64_t i = begin; i < end; ++i) {
    const Piece piece(i, a.size);
    const S* x = a.x + piece.row * a.x_stride;
    const S* raw = a.raw + piece.row * a.raw_stride;
    const S* shift = a.shift + piece.row * a.shift_stride;
    S* y = a.y + piece.row * a.size;
    CascadeSum<T> total;
    V ls;
    std::int64_t j = piece.first;
    for (; j + V::width <= piece.last; j += V::width) {
      store(y + j, step(load(x + j), load(raw + j), load(shift + j), &ls));
      total.add(ls);
    }
    if (j < piece.last) {
      const int rest = static_cast<int>(piece.last - j);
      store_n(y + j, step(load_n(x + j, rest), load_n(raw + j, rest), load_n(shift + j, rest), &ls), rest);
      total.add(select(Mask<T>::first(rest), ls, V(T(0))));
    }
    a.partial[i] = kInverse ? -total.value() : total.value();
  }
}

template <CouplingScale kScale, bool kInverse, class S>
void coupling_backward_pieces(const CouplingBackward<S>& a, std::int64_t begin, std::int64_t end) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const T factor = static_cast<T>(a.factor);
  V gx, gr, gt;
  const auto step = [&](V gy, V gld, V x, V raw, V shift) {
    V slope;
    const V ls = log_scale<kScale>(raw, factor, &slope);
    if constexpr (kInverse) {
      gx = gy * exp(-ls);
      gt = -gx;
      gr = -slope * fma(gx, x - shift, gld);
    } else {
      gx = gy * exp(ls);
      gt = gy;
      gr = slope * fma(gx, x, gld);
    }
  };
  for (std::int64_t i = begin; i < end; ++i) {
    const Piece piece(i, a.size);
    const S* gy = a.grad_y + piece.row * a.grad_y_stride;
    const S* x = a.x + piece.row * a.x_stride;
    const S* raw = a.raw + piece.row * a.raw_stride;
    const S* shift = a.shift + piece.row * a.shift_stride;
    S* grad_x = a.grad_x + piece.row * a.size;
    S* grad_raw = a.grad_raw + piece.row * a.size;
    S* grad_shift = a.grad_shift + piece.row * a.size;
    const V gld = V(a.grad_log_det[piece.row]);
    std::int64_t j = piece.first;
    for (; j + V::width <= piece.last; j += V::width) {
      step(load(gy + j), gld, load(x + j), load(raw + j), load(shift + j));
      store(grad_x + j, gx);
      store(grad_raw + j, gr);
      store(grad_shift + j, gt);
    }
    if (j < piece.last) {
      const int rest = static_cast<int>(piece.last - j);
      step(load_n(gy + j, rest), gld, load_n(x + j, rest), load_n(raw + j, rest), load_n(shift + j, rest));
      store_n(grad_x + j, gx, rest);
      store_n(grad_raw + j, gr, rest);
      store_n(grad_shift + j, gt, rest);
    }
  }
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
