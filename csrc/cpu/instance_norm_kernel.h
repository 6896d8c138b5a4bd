// Instance normalisation over ranges of jobs or of the pieces of one job, for one instruction set. Overloads by
// the arguments, NormForward or NormBackward, make the two passes of one shape.

#include "columns.h"
#include "instance_norm_sums.h"

namespace fastgen::FASTGEN_ISA_NS {

// (x - mean) * factor + offset from centre = -mean / 2 and gain = 2 * factor: half of x - mean cannot overflow.
template <class T>
FASTGEN_INLINE Vec<T> centred_map(Vec<T> x, Vec<T> centre, Vec<T> gain, Vec<T> offset) {
  return fma(fma(x, Vec<T>(T(0.5)), centre), gain, offset);
}

// A mean as the T that is subtracted from the values and the rest that goes into the offset.
template <class T>
struct SplitMean {
  Vec<T> high;
  Wide<T> low;
  explicit SplitMean(Wide<T> mean) : high(narrow(mean)), low(mean - widen(high)) {}
  Vec<T> centre() const { return high * Vec<T>(T(-0.5)); }
};

template <class T>
struct ForwardMap {
  Vec<T> centre, gain, offset;

  FASTGEN_INLINE ForwardMap(Wide<T> mean, Wide<T> var, Vec<T> scale, Vec<T> shift, double eps) {
    const SplitMean<T> m(mean);
    const Wide<T> factor = widen(scale) / sqrt(var + Wide<T>(eps));
    centre = m.centre();
    gain = narrow(factor + factor);
    offset = narrow(widen(shift) - m.low * factor);
  }
  FASTGEN_INLINE Vec<T> operator()(Vec<T> x) const { return centred_map(x, centre, gain, offset); }
};

// grad_x = a * (grad_y - mean(grad_y) - k * (x - mean)) with k = r * mean(grad_y * xhat), r = 1 / std, a = r *
// scale: linear maps of the centred values. a * k can be infinite where grad_x is not.
template <class T>
struct BackwardMap {
  Vec<T> grad_centre, gain, centre, slope, offset;
  Wide<T> grad_scale;

  FASTGEN_INLINE BackwardMap(Wide<T> sum, Wide<T> product, Wide<T> mean, Wide<T> var, Vec<T> scale, double eps,
                             std::int64_t size) {
    const Wide<T> count(static_cast<double>(size)), zero;
    const Wide<T> rstd = Wide<T>(1.0) / sqrt(var + Wide<T>(eps));
    grad_scale = product * rstd;
    const Wide<T> a = widen(scale) * rstd, k = rstd * (grad_scale / count);
    const SplitMean<T> g(sum / count), m(mean);
    grad_centre = g.centre();
    gain = narrow(a + a);
    centre = m.centre();
    slope = narrow(zero - k);
    offset = narrow(a * (k * m.low - g.low));
  }
};

template <class T>
FASTGEN_INLINE Vec<T> backward_map(Vec<T> gy, Vec<T> x, Vec<T> grad_centre, Vec<T> gain, Vec<T> centre,
                                   Vec<T> slope, Vec<T> offset) {
  const Vec<T> half(T(0.5));
  return fma(fma(fma(x, half, centre), slope, fma(gy, half, grad_centre)), gain, offset);
}

template <class S>
void norm_sums(const NormForward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  for (std::int64_t p = first; p < last; ++p) {
    const S* x = a.x(job) + p * a.piece * a.lanes;
    const std::int64_t n = a.piece_size(p), out = (job * a.pieces + p) * a.lanes;
    if (a.lanes == 1) {
      plane_moments(x, n, a.piece_mean + out, a.piece_squares + out);
    } else {
      channel_moments(x, n, a.lanes, a.piece_mean + out, a.piece_squares + out);
    }
  }
}

template <class S>
void norm_sums(const NormBackward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  for (std::int64_t p = first; p < last; ++p) {
    const std::int64_t begin = p * a.piece * a.lanes;
    const S *gy = a.grad_y(job) + begin, *x = a.x(job) + begin;
    const std::int64_t n = a.piece_size(p), out = (job * a.pieces + p) * a.lanes;
    const double* mean = a.mean + job * a.lanes;
    if (a.lanes == 1) {
      plane_products(gy, x, n, *mean, a.piece_sum + out, a.piece_product + out);
    } else {
      channel_products(gy, x, n, a.lanes, mean, a.piece_sum + out, a.piece_product + out);
    }
  }
}

// Mean of each plane of a job and sum of squares about it from those of its pieces: about a common origin first,
// so that constant planes have variance zero and large means lose nothing.
template <class S>
void combine_pieces(const NormForward<S>& a, std::int64_t job) {
  const double* means = a.piece_mean + job * a.pieces * a.lanes;
  const double* squares = a.piece_squares + job * a.pieces * a.lanes;
  double *mean = a.mean + job * a.lanes, *total = a.var + job * a.lanes;
  std::fill_n(mean, a.lanes, 0.0);
  std::fill_n(total, a.lanes, 0.0);
  for (std::int64_t p = 1; p < a.pieces; ++p) {
    const double w = static_cast<double>(a.piece_size(p)) / static_cast<double>(a.size);
    for (std::int64_t i = 0; i < a.lanes; ++i) mean[i] += w * (means[p * a.lanes + i] - means[i]);
  }
  for (std::int64_t i = 0; i < a.lanes; ++i) mean[i] += means[i];
  for (std::int64_t p = 0; p < a.pieces; ++p) {
    const double w = static_cast<double>(a.piece_size(p));
    for (std::int64_t i = 0; i < a.lanes; ++i) {
      const double d = means[p * a.lanes + i] - mean[i];
      total[i] += squares[p * a.lanes + i] + w * d * d;
    }
  }
}

template <class S>
void combine_pieces(const NormBackward<S>& a, std::int64_t job) {
  double *sum = a.sum + job * a.lanes, *product = a.product + job * a.lanes;
  std::fill_n(sum, a.lanes, 0.0);
  std::fill_n(product, a.lanes, 0.0);
  for (std::int64_t p = job * a.pieces; p < (job + 1) * a.pieces; ++p) {
    for (std::int64_t i = 0; i < a.lanes; ++i) {
      sum[i] += a.piece_sum[p * a.lanes + i];
      product[i] += a.piece_product[p * a.lanes + i];
    }
  }
}

// Statistics and coefficients of the planes [first, first + lanes) from sums in a.mean and a.var.
template <class S>
inline void norm_coefficients(const NormForward<S>& a, std::int64_t i, int lanes) {
  using T = acc_t<S>;
  const Wide<T> mean = load_doubles<T>(a.mean + i, lanes);
  const Wide<T> var = load_doubles<T>(a.var + i, lanes) / Wide<T>(static_cast<double>(a.size));
  const ForwardMap<T> map(mean, var, load_lanes(a.scale + i, lanes), load_lanes(a.shift + i, lanes), a.eps);
  store_doubles(a.var + i, var, lanes);
  store_lanes(a.centre + i, map.centre, lanes);
  store_lanes(a.gain + i, map.gain, lanes);
  store_lanes(a.offset + i, map.offset, lanes);
}

template <class S>
inline void norm_coefficients(const NormBackward<S>& a, std::int64_t i, int lanes) {
  using T = acc_t<S>;
  const BackwardMap<T> map(load_doubles<T>(a.sum + i, lanes), load_doubles<T>(a.product + i, lanes),
                           load_doubles<T>(a.mean + i, lanes), load_doubles<T>(a.var + i, lanes),
                           load_lanes(a.scale + i, lanes), a.eps, a.size);
  store_doubles(a.product + i, map.grad_scale, lanes);
  store_lanes(a.grad_centre + i, map.grad_centre, lanes);
  store_lanes(a.gain + i, map.gain, lanes);
  store_lanes(a.centre + i, map.centre, lanes);
  store_lanes(a.slope + i, map.slope, lanes);
  store_lanes(a.offset + i, map.offset, lanes);
}

// From the sums of the jobs [first, last) to what norm_apply takes.
template <class Norm>
void norm_finish(const Norm& a, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kWidth = Vec<typename Norm::Acc>::width;
  if (a.pieces > 1) {
    for (std::int64_t job = first; job < last; ++job) combine_pieces(a, job);
  }
  for (std::int64_t i = first * a.lanes; i < last * a.lanes; i += kWidth) {
    norm_coefficients(a, i, static_cast<int>(std::min(kWidth, last * a.lanes - i)));
  }
}

// What a map takes: values of the planes, other for each row, or the same coefficients for every row.
template <class S>
struct Rows {
  const S* first;
};
template <class S>
FASTGEN_INLINE const S* at_row(Rows<S> rows, std::int64_t offset) {
  return rows.first + offset;
}
template <class T>
FASTGEN_INLINE const T* at_row(const T* coefficients, std::int64_t) {
  return coefficients;
}

// out = f(in...) for `count` rows of n elements each.
template <class S, class F, class... In>
FASTGEN_INLINE void store_map(const NormShape& a, std::int64_t n, std::int64_t count, S* out, F f, In... in) {
  with_stores(
      a.past_caches, n,
      [&](auto put) FASTGEN_INLINE_LAMBDA {
        for (std::int64_t i = 0; i < n * count; i += n) transform_put(n, put, out + i, f, at_row(in, i)...);
      },
      out);
  if (a.past_caches) stream_end();
}

template <class S>
void norm_apply(const NormForward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  using V = Vec<acc_t<S>>;
  const std::int64_t begin = first * a.piece, end = std::min(a.size, last * a.piece);
  const S* x = a.x(job) + begin * a.lanes;
  S* y = a.y(job) + begin * a.lanes;
  const auto *centre = a.centre + job * a.lanes, *gain = a.gain + job * a.lanes,
             *offset = a.offset + job * a.lanes;
  if (a.lanes == 1) {
    const V c(*centre), g(*gain), o(*offset);
    store_map(a, end - begin, 1, y, [&](V v) { return centred_map(v, c, g, o); }, Rows<S>{x});
    return;
  }
  const auto step = [](V v, V c, V g, V o) { return centred_map(v, c, g, o); };
  store_map(a, a.lanes, end - begin, y, step, Rows<S>{x}, centre, gain, offset);
}

template <class S>
void norm_apply(const NormBackward<S>& a, std::int64_t job, std::int64_t first, std::int64_t last) {
  using V = Vec<acc_t<S>>;
  const auto step = [](V gy, V x, V e, V g, V c, V s, V o) { return backward_map(gy, x, e, g, c, s, o); };
  const std::int64_t begin = first * a.piece, end = std::min(a.size, last * a.piece);
  const S *gy = a.grad_y(job) + begin * a.lanes, *x = a.x(job) + begin * a.lanes;
  S* gx = a.grad_x(job) + begin * a.lanes;
  const std::int64_t plane = job * a.lanes;
  if (a.lanes == 1) {
    const V e(a.grad_centre[plane]), g(a.gain[plane]), c(a.centre[plane]), s(a.slope[plane]), o(a.offset[plane]);
    store_map(a, end - begin, 1, gx, [&](V v, V w) { return step(v, w, e, g, c, s, o); }, Rows<S>{gy}, Rows<S>{x});
    return;
  }
  store_map(a, a.lanes, end - begin, gx, step, Rows<S>{gy}, Rows<S>{x}, a.grad_centre + plane, a.gain + plane,
            a.centre + plane, a.slope + plane, a.offset + plane);
}

// Whole jobs. Several small ones share the square roots and divisions of a vector.
template <class Norm>
void norm_jobs(const Norm& a, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kElements = 8192, kWidth = Vec<typename Norm::Acc>::width;
  const std::int64_t block = std::clamp<std::int64_t>(kElements / (a.size * a.lanes), 1, kWidth);
  for (std::int64_t begin = first; begin < last; begin += block) {
    const std::int64_t end = std::min(last, begin + block);
    for (std::int64_t job = begin; job < end; ++job) norm_sums(a, job, 0, a.pieces);
    norm_finish(a, begin, end);
    for (std::int64_t job = end; job-- > begin;) {
      for (std::int64_t p = a.pieces; p-- > 0;) norm_apply(a, job, p, p + 1);
    }
  }
}

// As many planes as a vector has lanes, beginning with `plane`, as its lanes.
template <class S>
inline void norm_small_planes(const NormForward<S>& a, std::int64_t plane, int lanes) {
  using T = acc_t<S>;
  constexpr int kWidth = Vec<T>::width;
  alignas(64) T x[kSmallPlane * kWidth];
  load_columns(a.x(plane), a.x.stride, a.size, lanes, x);
  const Wide<T> origin = widen(load(x)), count(static_cast<double>(a.size));
  ProductSums<T> sums;
  for (std::int64_t j = 0; j < a.size; ++j) {
    const Wide<T> d = load_wide(x + j * kWidth, kWidth) - origin;
    sums.add(d, d);
  }
  const Wide<T> shift = sums.total / count, mean = origin + shift;
  const Wide<T> var = max(Wide<T>(), sums.product - sums.total * shift) / count;
  const ForwardMap<T> map(mean, var, load_lanes(a.scale + plane, lanes), load_lanes(a.shift + plane, lanes),
                          a.eps);
  store_doubles(a.mean + plane, mean, lanes);
  store_doubles(a.var + plane, var, lanes);
  for (std::int64_t j = 0; j < a.size; ++j) store(x + j * kWidth, map(load(x + j * kWidth)));
  store_columns(a.y(plane), a.size, a.size, lanes, x);
}

template <class S>
inline void norm_small_planes(const NormBackward<S>& a, std::int64_t plane, int lanes) {
  using T = acc_t<S>;
  constexpr int kWidth = Vec<T>::width;
  alignas(64) T gy[kSmallPlane * kWidth], x[kSmallPlane * kWidth];
  load_columns(a.grad_y(plane), a.grad_y.stride, a.size, lanes, gy);
  load_columns(a.x(plane), a.x.stride, a.size, lanes, x);
  const Wide<T> mean = load_doubles<T>(a.mean + plane, lanes), var = load_doubles<T>(a.var + plane, lanes);
  ProductSums<T> sums;
  for (std::int64_t j = 0; j < a.size * kWidth; j += kWidth) {
    sums.add(load_wide(gy + j, kWidth), load_wide(x + j, kWidth) - mean);
  }
  const BackwardMap<T> map(sums.total, sums.product, mean, var, load_lanes(a.scale + plane, lanes), a.eps, a.size);
  store_doubles(a.sum + plane, sums.total, lanes);
  store_doubles(a.product + plane, map.grad_scale, lanes);
  for (std::int64_t j = 0; j < a.size * kWidth; j += kWidth) {
    store(gy + j,
          backward_map(load(gy + j), load(x + j), map.grad_centre, map.gain, map.centre, map.slope, map.offset));
  }
  store_columns(a.grad_x(plane), a.size, a.size, lanes, gy);
}

// The planes [first, last) of at most kSmallPlane elements.
template <class Norm>
void norm_small(const Norm& a, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kWidth = Vec<typename Norm::Acc>::width;
  for (std::int64_t plane = first; plane < last; plane += kWidth) {
    norm_small_planes(a, plane, static_cast<int>(std::min(kWidth, last - plane)));
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
