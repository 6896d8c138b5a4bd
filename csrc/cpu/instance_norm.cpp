// Instance normalisation on the CPU, with an affine map for each plane: mean and variance in one sweep over
// memory, the result in a second while the values are in cache; likewise the gradient.

#include "planes.h"

namespace fastgen {

// Where the planes of a tensor are small enough, they are handled several at once, as the lanes of vectors.
constexpr std::int64_t kSmallPlane = 64;

// How the planes of all tensors of a call are cut, see Planes. Partial results are laid out (jobs, pieces, lanes),
// and (jobs, lanes) = (B, C) what there is one of for each plane.
struct NormShape {
  std::int64_t lanes, size, piece, pieces;
  bool past_caches;  // where the result goes
  std::int64_t piece_size(std::int64_t p) const { return std::min(piece, size - p * piece); }
};

template <class S>
struct NormForward : NormShape {
  using Acc = acc_t<S>;
  Jobs<const S> x;
  Jobs<S> y;
  double eps;
  const Acc *scale, *shift;
  double *mean, *var, *piece_mean, *piece_squares;
  Acc *centre, *gain, *offset;
};

template <class S>
struct NormBackward : NormShape {
  using Acc = acc_t<S>;
  Jobs<const S> grad_y, x;
  Jobs<S> grad_x;
  double eps;
  const Acc* scale;
  const double *mean, *var;
  double *sum, *product, *piece_sum, *piece_product;
  Acc *grad_centre, *gain, *centre, *slope, *offset;
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "instance_norm_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

// A (B, C) or (C,) parameter, of x's dtype or of the accumulator's T, as contiguous (B, C) values; `otherwise`
// where it is absent. Valid while the tensor lives.
template <class T>
class PlaneValues {
 public:
  PlaneValues(const std::optional<Tensor>& t, const Tensor& x, T otherwise, const char* what) {
    const std::int64_t batch = x.size(0), channels = x.size(1);
    if (!t) {
      copy_.assign(batch * channels, otherwise);
      return;
    }
    const ScalarType dtype = t->scalar_type() == x.scalar_type() ? x.scalar_type() : acc_type(x.scalar_type());
    if (t->dim() == 1) {
      check_shape(*t, {channels}, dtype, what);
    } else {
      check_shape(*t, {batch, channels}, dtype, what);
    }
    if (t->dim() == 2 && t->is_contiguous() && dtype == acc_type(dtype)) {
      given_ = static_cast<const T*>(t->data_ptr());
      return;
    }
    copy_.resize(batch * channels);
    dispatch_dtype(dtype, what, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const std::int64_t batch_stride = t->dim() == 2 ? t->stride(0) : 0, channel_stride = t->stride(t->dim() - 1);
      for (std::int64_t b = 0; b < batch; ++b) {
        const S* source = data<const S>(*t) + b * batch_stride;
        for (std::int64_t c = 0; c < channels; ++c) {
          copy_[b * channels + c] = static_cast<T>(source[c * channel_stride]);
        }
      }
    });
  }

  const T* get() const { return given_ ? given_ : copy_.data(); }

 private:
  const T* given_ = nullptr;
  std::vector<T> copy_;
};

// `count` arrays of (B, C) values behind one another.
template <class T>
class PlaneScratch {
 public:
  PlaneScratch(std::int64_t planes, int count) : planes_(planes), values_(new T[planes * count]) {}
  T* operator[](int i) const { return values_.get() + i * planes_; }

 private:
  std::int64_t planes_;
  std::unique_ptr<T[]> values_;
};

template <class Norm>
void run(const Planes& planes, const Norm& args, bool uniform) {
  if (uniform && planes.lanes == 1 && planes.size <= kSmallPlane) {
    // Whole vectors of planes for each thread, whatever the width.
    constexpr std::int64_t kGroup = 16;
    const std::int64_t grain = std::max<std::int64_t>(1, kPlanePiece / (kGroup * planes.size));
    torch::stable::parallel_for(
        0, (planes.jobs + kGroup - 1) / kGroup, grain, [&](std::int64_t first, std::int64_t last) {
          FASTGEN_DISPATCH_ISA(norm_small, args, first * kGroup, std::min(planes.jobs, last * kGroup));
        });
    return;
  }
  reduce_then_apply(
      planes, [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_jobs, args, range...); },
      [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_sums, args, range...); },
      [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_finish, args, range...); },
      [&](auto... range) { FASTGEN_DISPATCH_ISA(norm_apply, args, range...); });
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results instance_norm_fwd(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, double eps) {
  const Planes xs(x);
  Tensor y = xs.new_dense();
  Tensor mean = new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  Tensor var = new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  dispatch_dtype(x.scalar_type(), "instance_norm", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = acc_t<S>;
    const PlaneValues<T> scales(scale, x, T(1), "instance_norm: scale");
    const PlaneValues<T> shifts(shift, x, T(0), "instance_norm: shift");
    if (x.numel() == 0) {
      torch::stable::zero_(mean);
      torch::stable::zero_(var);
      return;
    }
    const std::int64_t planes = xs.jobs * xs.lanes;
    const PlaneScratch<double> pieces(xs.pieces > 1 ? planes * xs.pieces : 0, 2);
    const PlaneScratch<T> maps(planes, 3);
    NormForward<S> args{};
    static_cast<NormShape&>(args) = {xs.lanes, xs.size, xs.piece, xs.pieces, exceeds_caches(x, 2)};
    args.x = xs.pointers<const S>();
    args.y = Planes(y, xs.channels_last()).pointers<S>();
    args.eps = eps;
    args.scale = scales.get();
    args.shift = shifts.get();
    args.mean = data<double>(mean);
    args.var = data<double>(var);
    args.piece_mean = xs.pieces > 1 ? pieces[0] : args.mean;
    args.piece_squares = xs.pieces > 1 ? pieces[1] : args.var;
    args.centre = maps[0];
    args.gain = maps[1];
    args.offset = maps[2];
    run(xs, args, args.x.channels == 0);
  });
  return {y, mean, var};
}

// A parameter's gradient (B, C), or (C,) as the sum over the batch, from those of the planes.
template <class T>
Tensor parameter_gradient(const Tensor& x, const double* of_planes, bool per_channel) {
  const std::int64_t batch = x.size(0), channels = x.size(1);
  if (!per_channel) {
    Tensor result = new_empty(x, {batch, channels}, acc_type(x.scalar_type()));
    std::copy_n(of_planes, batch * channels, data<T>(result));
    return result;
  }
  std::vector<double> total(channels, 0.0);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t c = 0; c < channels; ++c) total[c] += of_planes[b * channels + c];
  }
  Tensor result = new_empty(x, {channels}, acc_type(x.scalar_type()));
  std::copy_n(total.data(), channels, data<T>(result));
  return result;
}

Results instance_norm_bwd(const Tensor& grad_y, const Tensor& x, const Tensor& mean, const Tensor& var,
                          std::optional<Tensor> scale, double eps) {
  check_like(grad_y, x, "instance_norm: grad_y");
  const Planes xs(x), gys(grad_y, xs.channels_last());
  const std::vector<std::int64_t> per_plane{x.size(0), x.size(1)};
  check_shape(mean, per_plane, ScalarType::Double, "instance_norm: mean");
  check_shape(var, per_plane, ScalarType::Double, "instance_norm: var");
  const Tensor means = torch::stable::contiguous(mean), vars = torch::stable::contiguous(var);
  Tensor grad_x = xs.new_dense(), grad_scale, grad_shift;
  dispatch_dtype(x.scalar_type(), "instance_norm", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = acc_t<S>;
    const PlaneValues<T> scales(scale, x, T(1), "instance_norm: scale");
    const std::int64_t planes = x.size(0) * x.size(1);
    const PlaneScratch<double> sums(planes, 2), pieces(xs.pieces > 1 ? planes * xs.pieces : 0, 2);
    if (x.numel() == 0) {
      std::fill_n(sums[0], 2 * planes, 0.0);
    } else {
      const PlaneScratch<T> maps(planes, 5);
      NormBackward<S> args{};
      static_cast<NormShape&>(args) = {xs.lanes, xs.size, xs.piece, xs.pieces, exceeds_caches(x, 3)};
      args.grad_y = gys.pointers<const S>();
      args.x = xs.pointers<const S>();
      args.grad_x = Planes(grad_x, xs.channels_last()).pointers<S>();
      args.eps = eps;
      args.scale = scales.get();
      args.mean = data<const double>(means);
      args.var = data<const double>(vars);
      args.sum = sums[0];
      args.product = sums[1];
      args.piece_sum = xs.pieces > 1 ? pieces[0] : args.sum;
      args.piece_product = xs.pieces > 1 ? pieces[1] : args.product;
      args.grad_centre = maps[0];
      args.gain = maps[1];
      args.centre = maps[2];
      args.slope = maps[3];
      args.offset = maps[4];
      run(xs, args, args.x.channels == 0 && args.grad_y.channels == 0);
    }
    const bool per_channel = scale && scale->dim() == 1;
    grad_scale = parameter_gradient<T>(x, sums[1], per_channel);
    grad_shift = parameter_gradient<T>(x, sums[0], per_channel);
  });
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("instance_norm_fwd", TORCH_BOX(&instance_norm_fwd));
  m.impl("instance_norm_bwd", TORCH_BOX(&instance_norm_bwd));
}

}  // namespace fastgen
