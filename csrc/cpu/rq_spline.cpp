// Rational-quadratic spline on the CPU: value and log-derivative in one pass over the parameters, and the
// gradient, recomputed from the inputs, in another.

#include "common.h"

namespace fastgen {

struct SplineOptions {
  double tail_bound, min_bin_width, min_bin_height, min_derivative;
  bool inverse;
};

// Element i has its bins - 1 derivatives at derivatives + i * derivatives_stride, and so on.
template <class S>
struct SplineInputs {
  const S *x, *widths, *heights, *derivatives;
  std::int64_t widths_stride, heights_stride, derivatives_stride, bins;
  SplineOptions options;
};

template <class S>
struct SplineGradients {
  const S* grad_y;
  S *grad_x, *grad_widths, *grad_heights, *grad_derivatives;
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "rq_spline_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

// Elements are handed out in chunks of whole samples, or in pieces of one sample where that is longer.
constexpr std::int64_t kChunk = 1024;

struct Chunks {
  std::int64_t samples, sample_size, pieces_each, samples_each, count;

  Chunks(std::int64_t samples, std::int64_t sample_size)
      : samples(samples),
        sample_size(sample_size),
        pieces_each(std::max<std::int64_t>(1, (sample_size + kChunk - 1) / kChunk)),
        samples_each(std::max<std::int64_t>(1, kChunk / std::max<std::int64_t>(1, sample_size))),
        count(sample_size == 0  ? 0
              : pieces_each > 1 ? samples * pieces_each
                                : (samples + samples_each - 1) / samples_each) {}

  // The elements [first, last) of a chunk, and its segments: whole samples, or one piece of a sample.
  struct Range {
    std::int64_t first, last, segment, segments;
  };

  Range operator[](std::int64_t i) const {
    if (pieces_each > 1) {
      const std::int64_t start = i / pieces_each * sample_size, first = start + i % pieces_each * kChunk;
      return {first, std::min(first + kChunk, start + sample_size), i, 1};
    }
    const std::int64_t sample = i * samples_each, end = std::min(samples, sample + samples_each);
    return {sample * sample_size, end * sample_size, sample, end - sample};
  }

  template <class F>
  void parallel(F&& f) const {
    torch::stable::parallel_for(0, count, 2, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) f((*this)[i]);
    });
  }
};

// A (..., k) tensor as records of k adjacent values, one fixed stride apart: slices of a conditioner's output are
// used where they lie.
struct Records {
  Tensor tensor;
  std::int64_t stride;

  explicit Records(const Tensor& t) : tensor(t), stride(find_stride(t)) {
    if (stride >= 0) return;
    tensor = torch::stable::contiguous(t);
    stride = t.size(t.dim() - 1);
  }

  template <class S>
  const S* data() const {
    return static_cast<const S*>(tensor.data_ptr());
  }

 private:
  // -1 where there is no such stride.
  static std::int64_t find_stride(const Tensor& t) {
    const std::int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) return -1;
    std::int64_t stride = -1, expected = -1;
    for (std::int64_t d = last - 1; d >= 0; --d) {
      if (t.size(d) == 1) continue;
      if (stride < 0) {
        stride = expected = t.stride(d);
      } else if (t.stride(d) != expected) {
        return -1;
      }
      expected *= t.size(d);
    }
    return std::max<std::int64_t>(stride, 0);
  }
};

struct Spline {
  Tensor x;
  Records widths, heights, derivatives;
  std::int64_t bins;
  SplineOptions options;
  Chunks chunks;

  Spline(const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives,
         std::int64_t batch_dims, const SplineOptions& options)
      : x(as_contiguous(x)),
        widths(checked(widths, x, last_size(widths), "rq_spline: widths")),
        heights(checked(heights, x, last_size(widths), "rq_spline: heights")),
        derivatives(checked(derivatives, x, last_size(widths) - 1, "rq_spline: derivatives")),
        bins(last_size(widths)),
        options(options),
        chunks(product(x, 0, batch_dims), product(x, batch_dims, x.dim())) {
    STD_TORCH_CHECK(bins >= 1, "rq_spline: widths must have at least one bin");
  }

  template <class S>
  SplineInputs<S> inputs() const {
    return {data<S>(x),    widths.data<S>(), heights.data<S>(),  derivatives.data<S>(),
            widths.stride, heights.stride,   derivatives.stride, bins,
            options};
  }

  static std::int64_t product(const Tensor& t, std::int64_t begin, std::int64_t end) {
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= t.dim(), "rq_spline: batch_dims is out of range");
    std::int64_t result = 1;
    for (std::int64_t d = begin; d < end; ++d) result *= t.size(d);
    return result;
  }

 private:
  static std::int64_t last_size(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() >= 1, "rq_spline: widths must have at least one dimension");
    return t.size(t.dim() - 1);
  }

  static Records checked(const Tensor& t, const Tensor& x, std::int64_t k, const char* what) {
    std::vector<std::int64_t> shape = sizes(x);
    shape.push_back(k);
    check_shape(t, shape, x.scalar_type(), what);
    return Records(t);
  }
};

std::vector<std::int64_t> batch_sizes(const Tensor& x, std::int64_t batch_dims) {
  std::vector<std::int64_t> result = sizes(x);
  result.resize(batch_dims);
  return result;
}

// Columns for the numerators of widths and heights and for the derivatives.
template <class S>
std::vector<acc_t<S>> workspace(std::int64_t bins) {
  return std::vector<acc_t<S>>(3 * bins * (64 / sizeof(acc_t<S>)));
}

std::tuple<Tensor, Tensor> rq_spline_fwd(const Tensor& x, const Tensor& widths, const Tensor& heights,
                                         const Tensor& derivatives, std::int64_t batch_dims, bool inverse,
                                         double tail_bound, double min_bin_width, double min_bin_height,
                                         double min_derivative) {
  const Spline spline(x, widths, heights, derivatives, batch_dims,
                      {tail_bound, min_bin_width, min_bin_height, min_derivative, inverse});
  const Chunks& chunks = spline.chunks;
  Tensor y = empty_contiguous(x);
  Tensor log_det = new_empty(x, batch_sizes(x, batch_dims), acc_type(x.scalar_type()));
  dispatch_dtype(x.scalar_type(), "rq_spline", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = acc_t<S>;
    const SplineInputs<S> inputs = spline.inputs<S>();
    const bool reduced = chunks.sample_size != 1;
    std::vector<T> partial(reduced ? chunks.samples * chunks.pieces_each : 0);
    chunks.parallel([&](const Chunks::Range& r) {
      std::vector<T> columns = workspace<S>(spline.bins), terms(reduced ? r.last - r.first : 0);
      T* out = reduced ? terms.data() : data<T>(log_det) + r.first;
      FASTGEN_DISPATCH_ISA(spline_forward, inputs, r.first, r.last, data<S>(y), out, columns.data());
      if (reduced) {
        FASTGEN_DISPATCH_ISA(sum_segments, out, r.segments, (r.last - r.first) / r.segments, T(1),
                             partial.data() + r.segment);
      }
    });
    if (reduced) sum_pieces(partial, chunks.samples, data<T>(log_det));
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rq_spline_bwd(const Tensor& grad_y, const Tensor& grad_log_det,
                                                         const Tensor& x, const Tensor& widths,
                                                         const Tensor& heights, const Tensor& derivatives,
                                                         std::int64_t batch_dims, bool inverse, double tail_bound,
                                                         double min_bin_width, double min_bin_height,
                                                         double min_derivative) {
  const Spline spline(x, widths, heights, derivatives, batch_dims,
                      {tail_bound, min_bin_width, min_bin_height, min_derivative, inverse});
  check_shape(grad_y, sizes(x), x.scalar_type(), "rq_spline: grad_y");
  check_shape(grad_log_det, batch_sizes(x, batch_dims), acc_type(x.scalar_type()), "rq_spline: grad_log_det");
  const Chunks& chunks = spline.chunks;
  const Tensor gy = as_contiguous(grad_y), gld = as_contiguous(grad_log_det);
  Tensor grad_x = empty_contiguous(x), grad_widths = empty_contiguous(widths);
  Tensor grad_heights = empty_contiguous(heights), grad_derivatives = empty_contiguous(derivatives);
  dispatch_dtype(x.scalar_type(), "rq_spline", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = acc_t<S>;
    const SplineInputs<S> inputs = spline.inputs<S>();
    const SplineGradients<S> gradients{data<S>(gy), data<S>(grad_x), data<S>(grad_widths), data<S>(grad_heights),
                                       data<S>(grad_derivatives)};
    const bool reduced = chunks.sample_size != 1;
    chunks.parallel([&](const Chunks::Range& r) {
      std::vector<T> columns = workspace<S>(spline.bins), terms(reduced ? r.last - r.first : 0);
      const T* from = data<T>(gld) + r.first / chunks.sample_size;
      for (std::int64_t i = 0; reduced && i < r.segments; ++i) {
        const std::int64_t size = (r.last - r.first) / r.segments;
        std::fill_n(terms.data() + i * size, size, from[i]);
      }
      FASTGEN_DISPATCH_ISA(spline_backward, inputs, gradients, r.first, r.last, reduced ? terms.data() : from,
                           columns.data());
    });
  });
  return {grad_x, grad_widths, grad_heights, grad_derivatives};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("rq_spline_fwd", TORCH_BOX(&rq_spline_fwd));
  m.impl("rq_spline_bwd", TORCH_BOX(&rq_spline_bwd));
}

}  // namespace fastgen
