// Instance normalisation on the CPU, with an affine map for each plane: mean and variance in one sweep over
// memory, the result in a second while the plane is in cache; likewise the gradient.

#include <optional>

#include "planes.h"

namespace fastgen {

// Partial results are laid out (jobs, pieces, lanes), the coefficients of a plane (jobs, lanes) = (B, C).
template <class S>
struct NormForward {
  Jobs<const S> x;
  Jobs<S> y;
  std::int64_t lanes, size, piece, pieces;
  double *piece_mean, *piece_squares;
  const acc_t<S>*centre, *gain, *offset;
};

template <class S>
struct NormBackward {
  Jobs<const S> grad_y, x;
  Jobs<S> grad_x;
  std::int64_t lanes, size, piece, pieces;
  const double* mean;
  double *piece_sum, *piece_product;
  const acc_t<S>*grad_centre, *gain, *centre, *slope, *offset;
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "instance_norm_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

// A (B, C) parameter of any floating dtype and strides as contiguous doubles; `otherwise` where it is absent.
std::vector<double> plane_values(const std::optional<Tensor>& t, const Tensor& x, double otherwise,
                                 const char* what) {
  const std::int64_t batch = x.size(0), channels = x.size(1);
  std::vector<double> values(batch * channels, otherwise);
  if (!t) return values;
  check_shape(*t, {batch, channels}, t->scalar_type(), what);
  dispatch_dtype(t->scalar_type(), what, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* source = data<const S>(*t);
    const std::int64_t batch_stride = t->stride(0), channel_stride = t->stride(1);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t c = 0; c < channels; ++c) {
        values[b * channels + c] = static_cast<double>(source[b * batch_stride + c * channel_stride]);
      }
    }
  });
  return values;
}

// A double as the sum of a T and a small rest.
template <class T>
struct Split {
  T high;
  double low;
  explicit Split(double a) : high(static_cast<T>(a)), low(a - static_cast<double>(high)) {}
};

// Mean and biased variance of each plane of a job from those of its pieces: about a common origin first, so that
// constant planes have variance zero and large means lose nothing.
template <class S>
void combine_moments(const NormForward<S>& a, std::int64_t job, double* mean, double* var) {
  const double* means = a.piece_mean + job * a.pieces * a.lanes;
  const double* squares = a.piece_squares + job * a.pieces * a.lanes;
  const double size = static_cast<double>(a.size);
  const auto weight = [&](std::int64_t p) { return static_cast<double>(std::min(a.piece, a.size - p * a.piece)); };
  for (std::int64_t i = 0; i < a.lanes; ++i) mean[i] = var[i] = 0;
  for (std::int64_t p = 1; p < a.pieces; ++p) {
    const double w = weight(p) / size;
    for (std::int64_t i = 0; i < a.lanes; ++i) mean[i] += w * (means[p * a.lanes + i] - means[i]);
  }
  for (std::int64_t i = 0; i < a.lanes; ++i) mean[i] += means[i];
  for (std::int64_t p = 0; p < a.pieces; ++p) {
    for (std::int64_t i = 0; i < a.lanes; ++i) {
      const double d = means[p * a.lanes + i] - mean[i];
      var[i] += squares[p * a.lanes + i] + weight(p) * d * d;
    }
  }
  for (std::int64_t i = 0; i < a.lanes; ++i) var[i] /= size;
}

using Grads = std::tuple<Tensor, Tensor, Tensor>;

Grads instance_norm_fwd(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, double eps) {
  const Planes xs(x);
  const std::vector<double> scales = plane_values(scale, x, 1, "instance_norm: scale");
  const std::vector<double> shifts = plane_values(shift, x, 0, "instance_norm: shift");
  Tensor y = xs.new_dense();
  Tensor mean = new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  Tensor var = new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  if (x.numel() == 0) return {y, torch::stable::zero_(mean), torch::stable::zero_(var)};
  dispatch_dtype(x.scalar_type(), "instance_norm", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = acc_t<S>;
    const std::int64_t planes = xs.jobs * xs.lanes;
    std::vector<double> piece_mean(planes * xs.pieces), piece_squares(planes * xs.pieces);
    std::vector<T> centre(planes), gain(planes), offset(planes);
    const NormForward<S> args{xs.pointers<const S>(),
                              Planes(y, xs.channels_last()).pointers<S>(),
                              xs.lanes,
                              xs.size,
                              xs.piece,
                              xs.pieces,
                              piece_mean.data(),
                              piece_squares.data(),
                              centre.data(),
                              gain.data(),
                              offset.data()};
    const auto finish = [&](std::int64_t job) {
      const std::int64_t first = job * xs.lanes;
      combine_moments(args, job, data<double>(mean) + first, data<double>(var) + first);
      for (std::int64_t i = first; i < first + xs.lanes; ++i) {
        const Split<T> m(data<double>(mean)[i]);
        const double a = scales[i] / std::sqrt(data<double>(var)[i] + eps);
        centre[i] = T(-0.5) * m.high;
        gain[i] = static_cast<T>(2 * a);
        offset[i] = static_cast<T>(shifts[i] - m.low * a);
      }
    };
    reduce_then_apply(
        xs, [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_moments, args, range...); }, finish,
        [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_forward, args, range...); });
  });
  return {y, mean, var};
}

Grads instance_norm_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& var,
                        std::optional<Tensor> scale, double eps) {
  check_like(grad_y, x, "instance_norm: grad_y");
  const Planes xs(x), gys(grad_y, xs.channels_last());
  const std::vector<std::int64_t> per_plane{x.size(0), x.size(1)};
  check_shape(mean, per_plane, ScalarType::Double, "instance_norm: mean");
  check_shape(var, per_plane, ScalarType::Double, "instance_norm: var");
  const std::vector<double> scales = plane_values(scale, x, 1, "instance_norm: scale");
  const Tensor means = torch::stable::contiguous(mean), vars = torch::stable::contiguous(var);
  Tensor grad_x = xs.new_dense();
  Tensor grad_scale = new_empty(x, per_plane, ScalarType::Double);
  Tensor grad_shift = new_empty(x, per_plane, ScalarType::Double);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_scale), torch::stable::zero_(grad_shift)};
  dispatch_dtype(x.scalar_type(), "instance_norm", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = acc_t<S>;
    const std::int64_t planes = xs.jobs * xs.lanes;
    std::vector<double> piece_sum(planes * xs.pieces), piece_product(planes * xs.pieces);
    std::vector<T> grad_centre(planes), gain(planes), centre(planes), slope(planes), offset(planes);
    const NormBackward<S> args{gys.pointers<const S>(),
                               xs.pointers<const S>(),
                               Planes(grad_x, xs.channels_last()).pointers<S>(),
                               xs.lanes,
                               xs.size,
                               xs.piece,
                               xs.pieces,
                               data<const double>(means),
                               piece_sum.data(),
                               piece_product.data(),
                               grad_centre.data(),
                               gain.data(),
                               centre.data(),
                               slope.data(),
                               offset.data()};
    const auto finish = [&](std::int64_t job) {
      const std::int64_t first = job * xs.lanes;
      const double* sums = piece_sum.data() + first * xs.pieces;
      const double* products = piece_product.data() + first * xs.pieces;
      for (std::int64_t lane = 0; lane < xs.lanes; ++lane) {
        const std::int64_t i = first + lane;
        double sum = 0, product = 0;
        for (std::int64_t p = 0; p < xs.pieces; ++p) {
          sum += sums[p * xs.lanes + lane];
          product += products[p * xs.lanes + lane];
        }
        const double rstd = 1 / std::sqrt(data<double>(vars)[i] + eps);
        data<double>(grad_shift)[i] = sum;
        data<double>(grad_scale)[i] = product * rstd;
        // grad_x = a * (grad_y - mean(grad_y) - xhat * mean(grad_y * xhat)), as linear maps of the centred values.
        const double a = scales[i] * rstd;
        const double b = -a * rstd * (product * rstd) / static_cast<double>(xs.size);
        const Split<T> g(sum / static_cast<double>(xs.size)), m(data<double>(means)[i]);
        grad_centre[i] = T(-0.5) * g.high;
        gain[i] = static_cast<T>(2 * a);
        centre[i] = T(-0.5) * m.high;
        slope[i] = static_cast<T>(2 * b);
        offset[i] = static_cast<T>(-a * g.low - b * m.low);
      }
    };
    reduce_then_apply(
        xs, [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_products, args, range...); }, finish,
        [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_backward, args, range...); });
  });
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("instance_norm_fwd", TORCH_BOX(&instance_norm_fwd));
  m.impl("instance_norm_bwd", TORCH_BOX(&instance_norm_bwd));
}

}  // namespace fastgen
