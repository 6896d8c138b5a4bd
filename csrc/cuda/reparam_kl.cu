// Gaussian reparameterisation and KL divergence on the GPU. The key stays on the device: nothing synchronises, and
// a CUDA graph replays with whatever the key holds then.

#include "reparam_kl.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "../common/rows.h"
#include "arguments.h"
#include "run.h"

namespace fastgen {
namespace {

// Where the noise comes from: exactly one of the two is given.
struct NoiseSource {
  std::optional<Rows> rows;
  std::optional<Tensor> key;

  NoiseSource(const std::optional<Tensor>& noise, const std::optional<Tensor>& key_tensor, const Tensor& mu) {
    STD_TORCH_CHECK(noise.has_value() != key_tensor.has_value(), "reparam_kl: expected either noise or key");
    if (noise.has_value()) {
      check_like(*noise, mu, "reparam_kl: noise");
      rows.emplace(*noise);
    } else {
      check_shape(*key_tensor, mu, {2}, ScalarType::Long, "reparam_kl: key");
      key = torch::stable::contiguous(*key_tensor);
    }
  }

  template <class S>
  const S* values() const {
    return rows.has_value() ? rows->row<S>(0) : nullptr;
  }
  std::int64_t stride() const { return rows.has_value() ? rows->stride : 0; }
  const std::int64_t* words() const { return key.has_value() ? data<const std::int64_t>(*key) : nullptr; }
};

std::tuple<Tensor, Tensor> reparam_kl_fwd(const Tensor& mu, const Tensor& logvar, std::optional<Tensor> noise,
                                          std::optional<Tensor> key) {
  check_like(logvar, mu, "reparam_kl: logvar");
  Run run(mu);
  const Rows mus(mu), logvars(logvar);
  const NoiseSource source(noise, key, mu);
  const ScalarType sums = acc_type(mu.scalar_type());
  Tensor z = torch::stable::new_empty(mu, sizes(mu));
  Tensor kl = torch::stable::new_empty(mu, {mus.count}, sums);
  dispatch_dtype(mu.scalar_type(), "reparam_kl", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const ReparamForward<S> args{mus.row<S>(0),  logvars.row<S>(0), source.values<S>(), mus.stride,
                                 logvars.stride, source.stride(),   mus.count,          mus.size,
                                 source.words(), data<S>(z),        data<acc_t<S>>(kl)};
    reparam_forward(args, run);
  });
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor> reparam_kl_bwd(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mu,
                                                  const Tensor& logvar, std::optional<Tensor> noise,
                                                  std::optional<Tensor> key, bool noise_grad) {
  check_like(logvar, mu, "reparam_kl: logvar");
  check_like(grad_z, mu, "reparam_kl: grad_z");
  check_shape(grad_kl, mu, {mu.size(0)}, acc_type(mu.scalar_type()), "reparam_kl: grad_kl");
  Run run(mu);
  const Rows gzs(grad_z), mus(mu), logvars(logvar);
  const Tensor gkl = torch::stable::contiguous(grad_kl);
  const NoiseSource source(noise, key, mu);
  STD_TORCH_CHECK(!noise_grad || noise.has_value(), "reparam_kl: noise_grad without noise");
  Tensor grad_mu = torch::stable::new_empty(mu, sizes(mu)), grad_logvar = torch::stable::new_empty(mu, sizes(mu));
  Tensor grad_noise = torch::stable::new_empty(mu, noise_grad ? sizes(mu) : std::vector<std::int64_t>{0});
  dispatch_dtype(mu.scalar_type(), "reparam_kl", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const ReparamBackward<S> args{gzs.row<S>(0),
                                  data<acc_t<S>>(gkl),
                                  mus.row<S>(0),
                                  logvars.row<S>(0),
                                  source.values<S>(),
                                  gzs.stride,
                                  mus.stride,
                                  logvars.stride,
                                  source.stride(),
                                  mus.count,
                                  mus.size,
                                  source.words(),
                                  data<S>(grad_mu),
                                  data<S>(grad_logvar),
                                  noise_grad ? data<S>(grad_noise) : nullptr};
    reparam_backward(args, run);
  });
  return {grad_mu, grad_logvar, grad_noise};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) {
  m.impl("reparam_kl_fwd", TORCH_BOX(&reparam_kl_fwd));
  m.impl("reparam_kl_bwd", TORCH_BOX(&reparam_kl_bwd));
}

}  // namespace fastgen
