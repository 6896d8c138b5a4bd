// Affine coupling on the CPU: y = s * x + t and log|det| in one pass, and its gradient in one pass.

#include "common.h"

namespace fastgen {

// kRaisedSigmoid: sigmoid with a floor under it. softplus has one formula for both.
enum class CouplingScale { kExp, kTanh, kSigmoid, kRaisedSigmoid, kAtan, kSoftplus };

// Rows of parameters, side by side or at every second place: the scales, or the shifts, of a network that gives
// them as pairs.
template <class S>
struct Parameters {
  const S* data;
  std::int64_t stride;
  bool paired;
};

template <class S>
struct CouplingForward {
  const S* x;
  Parameters<S> raw, shift;
  std::int64_t x_stride, size;
  bool dense;
  S* y;
  acc_t<S>* partial;
  CouplingScale scale;
  bool inverse;
  double factor, min_scale;
};

template <class S>
struct CouplingBackward {
  const S* grad_y;
  const acc_t<S>* grad_log_det;
  const S* x;
  Parameters<S> raw, shift;  // shift: of the inverse only
  std::int64_t grad_y_stride, x_stride, size;
  bool dense;
  S *grad_x, *grad_raw, *grad_shift;  // grad_shift: of the inverse only
  CouplingScale scale;
  bool inverse;
  double factor, min_scale;
};

template <class F>
void dispatch_coupling(CouplingScale scale, bool inverse, F&& f) {
  const auto with = [&](auto s) { inverse ? f(s, std::true_type{}) : f(s, std::false_type{}); };
  switch (scale) {
    case CouplingScale::kExp:
      return with(std::integral_constant<CouplingScale, CouplingScale::kExp>{});
    case CouplingScale::kTanh:
      return with(std::integral_constant<CouplingScale, CouplingScale::kTanh>{});
    case CouplingScale::kSigmoid:
      return with(std::integral_constant<CouplingScale, CouplingScale::kSigmoid>{});
    case CouplingScale::kRaisedSigmoid:
      return with(std::integral_constant<CouplingScale, CouplingScale::kRaisedSigmoid>{});
    case CouplingScale::kAtan:
      return with(std::integral_constant<CouplingScale, CouplingScale::kAtan>{});
    case CouplingScale::kSoftplus:
      return with(std::integral_constant<CouplingScale, CouplingScale::kSoftplus>{});
  }
}

}  // namespace fastgen

#define FASTGEN_ISA_FILE "affine_coupling_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

CouplingScale parse_scale(const std::string& name, double min_scale) {
  if (name == "exp") return CouplingScale::kExp;
  if (name == "tanh") return CouplingScale::kTanh;
  if (name == "sigmoid") return min_scale > 0 ? CouplingScale::kRaisedSigmoid : CouplingScale::kSigmoid;
  if (name == "softplus") return CouplingScale::kSoftplus;
  STD_TORCH_CHECK(name == "atan", "affine_coupling: unknown scale '", name, "'");
  return CouplingScale::kAtan;
}

struct ParameterRows {
  Tensor tensor;
  std::int64_t stride;
  bool paired;

  ParameterRows(const Tensor& t, std::int64_t row_size) : tensor(t), paired(row_size > 1 && in_pairs(t)) {
    if (paired) {
      stride = t.size(0) > 1 ? t.stride(0) : 2 * row_size;
    } else {
      const Rows rows(t);
      tensor = rows.tensor;
      stride = rows.stride;
    }
  }

  bool dense(std::int64_t row_size) const { return stride == (paired ? 2 * row_size : row_size); }

  template <class S>
  Parameters<S> as() const {
    return {static_cast<const S*>(tensor.data_ptr()), stride, paired};
  }

 private:
  static bool in_pairs(const Tensor& t) {
    std::int64_t expected = 2;
    for (std::int64_t d = t.dim() - 1; d > 0; --d) {
      if (t.size(d) != 1 && t.stride(d) != expected) return false;
      expected *= t.size(d);
    }
    return true;
  }
};

std::tuple<Tensor, Tensor> affine_coupling_fwd(const Tensor& x, const Tensor& raw_scale, const Tensor& shift,
                                               std::string scale, bool inverse, double scale_factor,
                                               double min_scale) {
  check_like(raw_scale, x, "affine_coupling: raw_scale");
  check_like(shift, x, "affine_coupling: shift");
  const Rows xs(x);
  const ParameterRows raws(raw_scale, xs.size), shifts(shift, xs.size);
  Tensor y = empty_contiguous(x);
  Tensor log_det = new_empty(x, {xs.count}, acc_type(x.scalar_type()));
  dispatch_dtype(x.scalar_type(), "affine_coupling", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    sum_rows(xs.count, xs.size, data<acc_t<S>>(log_det), [&](acc_t<S>* partial) {
      const bool dense = xs.dense() && raws.dense(xs.size) && shifts.dense(xs.size);
      const CouplingForward<S> args{xs.row<S>(0), raws.as<S>(), shifts.as<S>(),
                                    xs.stride,    xs.size,      dense,
                                    data<S>(y),   partial,      parse_scale(scale, min_scale),
                                    inverse,      scale_factor, min_scale};
      parallel_pieces(xs.count, xs.size, [&](std::int64_t begin, std::int64_t end) {
        FASTGEN_DISPATCH_ISA(coupling_forward, args, begin, end);
      });
    });
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_bwd(const Tensor& grad_y, const Tensor& grad_log_det,
                                                       const Tensor& x, const Tensor& raw_scale,
                                                       const Tensor& shift, std::string scale, bool inverse,
                                                       double scale_factor, double min_scale) {
  check_like(raw_scale, x, "affine_coupling: raw_scale");
  check_like(shift, x, "affine_coupling: shift");
  check_like(grad_y, x, "affine_coupling: grad_y");
  check_shape(grad_log_det, {x.size(0)}, acc_type(x.scalar_type()), "affine_coupling: grad_log_det");
  const Rows gys(grad_y), xs(x);
  const ParameterRows raws(raw_scale, xs.size), shifts(inverse ? shift : x, xs.size);
  const Tensor gld = as_contiguous(grad_log_det);
  Tensor grad_x = empty_contiguous(x), grad_raw = empty_contiguous(x);
  Tensor grad_shift = inverse ? empty_contiguous(x) : new_empty(x, {0}, x.scalar_type());
  dispatch_dtype(x.scalar_type(), "affine_coupling", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const bool dense = gys.dense() && xs.dense() && raws.dense(xs.size) && shifts.dense(xs.size);
    const CouplingBackward<S> args{gys.row<S>(0),
                                   data<acc_t<S>>(gld),
                                   xs.row<S>(0),
                                   raws.as<S>(),
                                   shifts.as<S>(),
                                   gys.stride,
                                   xs.stride,
                                   xs.size,
                                   dense,
                                   data<S>(grad_x),
                                   data<S>(grad_raw),
                                   data<S>(grad_shift),
                                   parse_scale(scale, min_scale),
                                   inverse,
                                   scale_factor,
                                   min_scale};
    parallel_pieces(xs.count, xs.size, [&](std::int64_t begin, std::int64_t end) {
      FASTGEN_DISPATCH_ISA(coupling_backward, args, begin, end);
    });
  });
  return {grad_x, grad_raw, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("affine_coupling_fwd", TORCH_BOX(&affine_coupling_fwd));
  m.impl("affine_coupling_bwd", TORCH_BOX(&affine_coupling_bwd));
}

}  // namespace fastgen
