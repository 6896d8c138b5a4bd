// The sums of instance normalisation over one piece of a plane, or of the interleaved planes of a sample, for one
// instruction set.

#include "wide.h"

namespace fastgen::FASTGEN_ISA_NS {

// Sums of u and of u * v in double.
template <class T>
struct ProductSums {
  Wide<T> total, product;
  FASTGEN_INLINE void add(Wide<T> u, Wide<T> v) {
    total = total + u;
    product = fma(u, v, product);
  }
};

// term(j, lanes, sums) for n elements a vector at a time, in two chains so that additions need not wait.
template <class T, class F>
FASTGEN_INLINE ProductSums<T> sum_vectors(std::int64_t n, F term) {
  constexpr int kWidth = Vec<T>::width;
  ProductSums<T> even, odd;
  std::int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    term(j, kWidth, even);
    term(j + kWidth, kWidth, odd);
  }
  if (j + kWidth <= n) {
    term(j, kWidth, even);
    j += kWidth;
  }
  if (j < n) term(j, static_cast<int>(n - j), odd);
  return {even.total + odd.total, even.product + odd.product};
}

// Sums of x - anchor and of its square.
template <class S, class T = acc_t<S>>
inline ProductSums<T> anchored_sums(const S* x, std::int64_t n, T anchor) {
  const Vec<T> origin(anchor);
  const Wide<T> wide_origin = widen(origin);
  return sum_vectors<T>(n, [&](std::int64_t j, int lanes, ProductSums<T>& sums) FASTGEN_INLINE_LAMBDA {
    const Wide<T> value = lanes == Vec<T>::width
                              ? load_wide(x + j, Vec<T>::width)
                              : widen(select(Mask<T>::first(lanes), load_n(x + j, lanes), origin));
    const Wide<T> d = value - wide_origin;
    sums.add(d, d);
  });
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

// Sums of grad_y and of grad_y * (x - mean).
template <class S>
inline void plane_products(const S* gy, const S* x, std::int64_t n, double mean, double* total, double* product) {
  using T = acc_t<S>;
  const Wide<T> origin(mean);
  const ProductSums<T> sums =
      sum_vectors<T>(n, [&](std::int64_t j, int lanes, ProductSums<T>& sums) FASTGEN_INLINE_LAMBDA {
        sums.add(load_wide(gy + j, lanes), load_wide(x + j, lanes) - origin);
      });
  *total = sum(sums.total);
  *product = sum(sums.product);
}

// Vectors of channels that are summed at once: as many as leave the sums in registers, for whole cache lines of
// several neighbours keep the memory busy where one does not.
#if defined(FASTGEN_SIMD_AVX512)
constexpr int kColumns = 4;
#elif defined(FASTGEN_SIMD_AVX2)
constexpr int kColumns = 2;
#else
constexpr int kColumns = 1;
#endif

// f(columns, c, lanes) over the channels, kColumns vectors of them at once while there are as many.
template <class T, class F>
FASTGEN_INLINE void for_columns(std::int64_t channels, F f) {
  constexpr int kWidth = Vec<T>::width;
  std::int64_t c = 0;
  for (; c + kColumns * kWidth <= channels; c += kColumns * kWidth)
    f(std::integral_constant<int, kColumns>{}, c, kWidth);
  for (; c < channels; c += kWidth) {
    f(std::integral_constant<int, 1>{}, c, static_cast<int>(channels - c < kWidth ? channels - c : kWidth));
  }
}

// Totals and products (channels,) of what term(element, lanes, origin, sums) adds for each row; origin(c, lanes)
// is asked once for the channels from c. Rows are taken in blocks that stay in the first-level cache from one
// group of columns to the next.
template <class T, class Origin, class Term>
FASTGEN_INLINE void sum_rows(std::int64_t rows, std::int64_t channels, double* total, double* product,
                             Origin origin, Term term) {
  constexpr int kWidth = Vec<T>::width;
  const std::int64_t block = std::max<std::int64_t>(8, 4096 / channels);
  std::fill_n(total, channels, 0.0);
  std::fill_n(product, channels, 0.0);
  for (std::int64_t begin = 0; begin < rows; begin += block) {
    const std::int64_t end = std::min(rows, begin + block);
    for_columns<T>(channels, [&](auto columns, std::int64_t first, int lanes) FASTGEN_INLINE_LAMBDA {
      Wide<T> origins[columns()];
      ProductSums<T> sums[columns()];
      for (int k = 0; k < columns(); ++k) {
        const std::int64_t c = first + k * kWidth;
        origins[k] = origin(c, lanes);
        sums[k] = {load_doubles<T>(total + c, lanes), load_doubles<T>(product + c, lanes)};
      }
      for (std::int64_t r = begin; r < end; ++r) {
        for (int k = 0; k < columns(); ++k) term(r * channels + first + k * kWidth, lanes, origins[k], sums[k]);
      }
      for (int k = 0; k < columns(); ++k) {
        const std::int64_t c = first + k * kWidth;
        store_doubles(total + c, sums[k].total, lanes);
        store_doubles(product + c, sums[k].product, lanes);
      }
    });
  }
}

// The moments of interleaved planes; the origin is the first row.
template <class S>
inline void channel_moments(const S* x, std::int64_t rows, std::int64_t channels, double* mean, double* squares) {
  using T = acc_t<S>;
  using W = Wide<T>;
  sum_rows<T>(
      rows, channels, mean, squares,
      [&](std::int64_t c, int lanes) FASTGEN_INLINE_LAMBDA { return load_wide(x + c, lanes); },
      [&](std::int64_t i, int lanes, W origin, ProductSums<T>& sums) FASTGEN_INLINE_LAMBDA {
        const W d = load_wide(x + i, lanes) - origin;
        sums.add(d, d);
      });
  for (std::int64_t c = 0; c < channels; ++c) {
    const double total = mean[c], shift = total / static_cast<double>(rows);
    const double centred = squares[c] - total * shift;
    mean[c] = static_cast<double>(static_cast<T>(x[c])) + shift;
    squares[c] = centred < 0 ? 0 : centred;
  }
}

template <class S>
inline void channel_products(const S* gy, const S* x, std::int64_t rows, std::int64_t channels, const double* mean,
                             double* total, double* product) {
  using T = acc_t<S>;
  using W = Wide<T>;
  sum_rows<T>(
      rows, channels, total, product,
      [&](std::int64_t c, int lanes) FASTGEN_INLINE_LAMBDA { return load_doubles<T>(mean + c, lanes); },
      [&](std::int64_t i, int lanes, W origin, ProductSums<T>& sums)
          FASTGEN_INLINE_LAMBDA { sums.add(load_wide(gy + i, lanes), load_wide(x + i, lanes) - origin); });
}

}  // namespace fastgen::FASTGEN_ISA_NS
