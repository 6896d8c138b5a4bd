// Gaussian reparameterisation and KL divergence on the CPU, forward and gradient in one pass each. Noise is given,
// or made on the fly from a key.

#include "philox.h"

namespace fastgen {

template <class S>
struct ReparamForward {
  const S *mu, *logvar, *noise;  // noise null: made from the key
  std::int64_t mu_stride, logvar_stride, noise_stride, size;
  PhiloxKey key;
  bool dense;
  S* z;
  acc_t<S>* partial;
};

template <class S>
struct ReparamBackward {
  const S* grad_z;
  const acc_t<S>* grad_kl;
  const S *mu, *logvar, *noise;
  std::int64_t grad_z_stride, mu_stride, logvar_stride, noise_stride, size;
  PhiloxKey key;
  bool dense;
  S *grad_mu, *grad_logvar, *grad_noise;  // grad_noise null: not wanted
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "reparam_kl_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

// Where the noise comes from: exactly one of the two is given.
struct NoiseSource {
  std::optional<Rows> rows;
  PhiloxKey key{0, 0};

  NoiseSource(const std::optional<Tensor>& noise, const std::optional<Tensor>& key_tensor, const Tensor& mu) {
    STD_TORCH_CHECK(noise.has_value() != key_tensor.has_value(), "reparam_kl: expected either noise or key");
    if (noise.has_value()) {
      check_like(*noise, mu, "reparam_kl: noise");
      rows.emplace(*noise);
    } else {
      key = read_key(*key_tensor, "reparam_kl: key");
    }
  }

  template <class S>
  const S* data() const {
    return rows.has_value() ? rows->row<S>(0) : nullptr;
  }
  std::int64_t stride() const { return rows.has_value() ? rows->stride : 0; }
  bool dense() const { return !rows.has_value() || rows->dense(); }
};

std::tuple<Tensor, Tensor> reparam_kl_fwd(const Tensor& mu, const Tensor& logvar, std::optional<Tensor> noise,
                                          std::optional<Tensor> key) {
  check_like(logvar, mu, "reparam_kl: logvar");
  const Rows mus(mu), logvars(logvar);
  const NoiseSource source(noise, key, mu);
  Tensor z = empty_contiguous(mu);
  Tensor kl = new_empty(mu, {mus.count}, acc_type(mu.scalar_type()));
  dispatch_dtype(mu.scalar_type(), "reparam_kl", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    sum_rows(mus.count, mus.size, data<acc_t<S>>(kl), [&](acc_t<S>* partial) {
      const bool dense = mus.dense() && logvars.dense() && source.dense();
      const ReparamForward<S> args{mus.row<S>(0),  logvars.row<S>(0), source.data<S>(), mus.stride,
                                   logvars.stride, source.stride(),   mus.size,         source.key,
                                   dense,          data<S>(z),        partial};
      parallel_pieces(mus.count, mus.size, [&](std::int64_t begin, std::int64_t end) {
        FASTGEN_DISPATCH_ISA(reparam_forward, args, begin, end);
      });
    });
  });
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor> reparam_kl_bwd(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mu,
                                                  const Tensor& logvar, std::optional<Tensor> noise,
                                                  std::optional<Tensor> key, bool noise_grad) {
  check_like(logvar, mu, "reparam_kl: logvar");
  check_like(grad_z, mu, "reparam_kl: grad_z");
  check_shape(grad_kl, {mu.size(0)}, acc_type(mu.scalar_type()), "reparam_kl: grad_kl");
  const Rows gzs(grad_z), mus(mu), logvars(logvar);
  const Tensor gkl = as_contiguous(grad_kl);
  const NoiseSource source(noise, key, mu);
  Tensor grad_mu = empty_contiguous(mu), grad_logvar = empty_contiguous(mu);
  Tensor grad_noise = noise_grad ? empty_contiguous(mu) : new_empty(mu, {0}, mu.scalar_type());
  dispatch_dtype(mu.scalar_type(), "reparam_kl", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const bool dense = gzs.dense() && mus.dense() && logvars.dense() && source.dense();
    const ReparamBackward<S> args{
        gzs.row<S>(0),     data<acc_t<S>>(gkl),  mus.row<S>(0),
        logvars.row<S>(0), source.data<S>(),     gzs.stride,
        mus.stride,        logvars.stride,       source.stride(),
        mus.size,          source.key,           dense,
        data<S>(grad_mu),  data<S>(grad_logvar), noise_grad ? data<S>(grad_noise) : nullptr};
    parallel_pieces(mus.count, mus.size, [&](std::int64_t begin, std::int64_t end) {
      FASTGEN_DISPATCH_ISA(reparam_backward, args, begin, end);
    });
  });
  return {grad_mu, grad_logvar, grad_noise};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("reparam_kl_fwd", TORCH_BOX(&reparam_kl_fwd));
  m.impl("reparam_kl_bwd", TORCH_BOX(&reparam_kl_bwd));
}

}  // namespace fastgen
