// Instance normalisation over a range of pieces of one job, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

// Sums of u and of u * v in double.
template <class T>
struct ProductSums {
  Wide<T> total, product;
  void add(Wide<T> u, Wide<T> v) {
    total = total + u;
    product = fma(u, v, product);
  }
};

// Sums of x - anchor and of its square.
template <class S, class T = acc_t<S>>
inline ProductSums<T> anchored_sums(const S* x, std::int64_t n, T anchor) {
  using V = Vec<T>;
  const V origin(anchor);
  const Wide<T> wide_origin = widen(origin);
  ProductSums<T> sums;
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    const Wide<T> d = widen(load(x + j)) - wide_origin;
    sums.add(d, d);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    const Wide<T> d = widen(select(Mask<T>::first(rest), load_n(x + j, rest), origin)) - wide_origin;
    sums.add(d, d);
  }
  return sums;
}

// The origin of a plane's sums is its first element, or the mean of its head where it is long: what cancels in
// sum(d^2) - sum(d)^2 / n is then at most max(n / kHead, kHead) times the result, and a constant plane gives zero.
constexpr std::int64_t kHead = 256;

template <class S>
inline void plane_moments(const S* x, std::int64_t n, double* mean, double* squares) {
  using T = acc_t<S>;
  T anchor = static_cast<T>(x[0]);
  if (n > kHead) {
    const double shift = sum(anchored_sums(x, kHead, anchor).total) / static_cast<double>(kHead);
    anchor = static_cast<T>(static_cast<double>(anchor) + shift);
  }
  const ProductSums<T> sums = anchored_sums(x, n, anchor);
  const double total = sum(sums.total), shift = total / static_cast<double>(n);
  const double centred = sum(sums.product) - total * shift;
  *mean = static_cast<double>(anchor) + shift;
  *squares = centred < 0 ? 0 : centred;
}

// The same for interleaved planes; the origin is the first row.
template <class S>
inline void channel_moments(const S* x, std::int64_t rows, std::int64_t channels, double* mean, double* squares) {
  using T = acc_t<S>;
  constexpr int kWidth = Vec<T>::width;
  const double count = static_cast<double>(rows);
  for (std::int64_t c = 0; c < channels; c += kWidth) {
    const int lanes = static_cast<int>(std::min<std::int64_t>(kWidth, channels - c));
    const Wide<T> origin = widen(load_lanes(x + c, lanes));
    ProductSums<T> sums;
    for (std::int64_t r = 0; r < rows; ++r) {
      const Wide<T> d = widen(load_lanes(x + r * channels + c, lanes)) - origin;
      sums.add(d, d);
    }
    double total[kWidth], product[kWidth], first[kWidth];
    store_n(total, sums.total, lanes);
    store_n(product, sums.product, lanes);
    store_n(first, origin, lanes);
    for (int i = 0; i < lanes; ++i) {
      const double shift = total[i] / count, centred = product[i] - total[i] * shift;
      mean[c + i] = first[i] + shift;
      squares[c + i] = centred < 0 ? 0 : centred;
    }
  }
}

template <class S>
void norm_moments(const NormForward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  for (std::int64_t p = first; p < last; ++p) {
    const S* x = a.x(job) + p * a.piece * a.lanes;
    const std::int64_t n = std::min(a.piece, a.size - p * a.piece);
    double* mean = a.piece_mean + (job * a.pieces + p) * a.lanes;
    double* squares = a.piece_squares + (job * a.pieces + p) * a.lanes;
    if (a.lanes == 1) {
      plane_moments(x, n, mean, squares);
    } else {
      channel_moments(x, n, a.lanes, mean, squares);
    }
  }
}

// (x - origin) * factor + offset from centre = -origin / 2 and gain = 2 * factor: half of x - origin cannot
// overflow.
template <class T>
inline Vec<T> centred_map(Vec<T> x, Vec<T> centre, Vec<T> gain, Vec<T> offset) {
  return fma(fma(x, Vec<T>(T(0.5)), centre), gain, offset);
}

template <class S>
void norm_forward(const NormForward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  using V = Vec<acc_t<S>>;
  const std::int64_t begin = first * a.piece, end = std::min(a.size, last * a.piece);
  const S* x = a.x(job) + begin * a.lanes;
  S* y = a.y(job) + begin * a.lanes;
  const auto *centre = a.centre + job * a.lanes, *gain = a.gain + job * a.lanes,
             *offset = a.offset + job * a.lanes;
  if (a.lanes == 1) {
    const V c(*centre), g(*gain), o(*offset);
    transform(end - begin, y, [&](V v) { return centred_map(v, c, g, o); }, x);
    return;
  }
  for (std::int64_t r = begin; r < end; ++r, x += a.lanes, y += a.lanes) {
    transform(a.lanes, y, [](V v, V c, V g, V o) { return centred_map(v, c, g, o); }, x, centre, gain, offset);
  }
}

// Sums of grad_y and of grad_y * (x - mean).
template <class S>
inline void plane_products(const S* gy, const S* x, std::int64_t n, double mean, double* total, double* product) {
  using T = acc_t<S>;
  using V = Vec<T>;
  const Wide<T> origin(mean);
  ProductSums<T> sums;
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) sums.add(widen(load(gy + j)), widen(load(x + j)) - origin);
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    sums.add(widen(load_n(gy + j, rest)), widen(load_n(x + j, rest)) - origin);
  }
  *total = sum(sums.total);
  *product = sum(sums.product);
}

template <class S>
inline void channel_products(const S* gy, const S* x, std::int64_t rows, std::int64_t channels, const double* mean,
                             double* total, double* product) {
  using T = acc_t<S>;
  constexpr int kWidth = Vec<T>::width;
  for (std::int64_t c = 0; c < channels; c += kWidth) {
    const int lanes = static_cast<int>(std::min<std::int64_t>(kWidth, channels - c));
    const Wide<T> origin = load_wide<T>(mean + c, lanes);
    ProductSums<T> sums;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t i = r * channels + c;
      sums.add(widen(load_lanes(gy + i, lanes)), widen(load_lanes(x + i, lanes)) - origin);
    }
    store_n(total + c, sums.total, lanes);
    store_n(product + c, sums.product, lanes);
  }
}

template <class S>
void norm_products(const NormBackward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  for (std::int64_t p = first; p < last; ++p) {
    const std::int64_t begin = p * a.piece * a.lanes;
    const std::int64_t n = std::min(a.piece, a.size - p * a.piece);
    const S *gy = a.grad_y(job) + begin, *x = a.x(job) + begin;
    const double* mean = a.mean + job * a.lanes;
    double* total = a.piece_sum + (job * a.pieces + p) * a.lanes;
    double* product = a.piece_product + (job * a.pieces + p) * a.lanes;
    if (a.lanes == 1) {
      plane_products(gy, x, n, *mean, total, product);
    } else {
      channel_products(gy, x, n, a.lanes, mean, total, product);
    }
  }
}

template <class S>
void norm_backward(const NormBackward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  using V = Vec<acc_t<S>>;
  const auto step = [](V gy, V x, V grad_centre, V gain, V centre, V slope, V offset) {
    return centred_map(gy, grad_centre, gain, centred_map(x, centre, slope, offset));
  };
  const std::int64_t begin = first * a.piece, end = std::min(a.size, last * a.piece);
  const S *gy = a.grad_y(job) + begin * a.lanes, *x = a.x(job) + begin * a.lanes;
  S* gx = a.grad_x(job) + begin * a.lanes;
  const std::int64_t plane = job * a.lanes;
  if (a.lanes == 1) {
    const V e(a.grad_centre[plane]), g(a.gain[plane]), c(a.centre[plane]), s(a.slope[plane]), o(a.offset[plane]);
    transform(end - begin, gx, [&](V v, V w) { return step(v, w, e, g, c, s, o); }, gy, x);
    return;
  }
  for (std::int64_t r = begin; r < end; ++r, gy += a.lanes, x += a.lanes, gx += a.lanes) {
    transform(a.lanes, gx, step, gy, x, a.grad_centre + plane, a.gain + plane, a.centre + plane, a.slope + plane,
              a.offset + plane);
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
