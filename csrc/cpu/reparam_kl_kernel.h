// Gaussian reparameterisation and KL divergence over a range of pieces, for one instruction set.

#include "philox_simd.h"

namespace fastgen::FASTGEN_ISA_NS {

// sigma = exp(logvar / 2), exp(logvar) - 1 and exp(logvar) - 1 - logvar. With m = sigma - 1 the last two are m (m
// + 2) and m^2 + 2 (m - logvar / 2): nothing cancels where logvar is near 0.
template <class T>
FASTGEN_INLINE void sigma_terms(Vec<T> logvar, Vec<T>* sigma, Vec<T>* variance_m1, Vec<T>* excess) {
  using V = Vec<T>;
  const ExpExcess<T> half = exp_excess(logvar * V(T(0.5)));
  *sigma = half.exp;
  *variance_m1 = half.expm1 * (half.expm1 + V(T(2)));
  *excess = fma(half.expm1, half.expm1, half.excess + half.excess);
}

// n elements of one row; eps has the type it is stored in. Adds mu^2 + exp(logvar) - 1 - logvar to *total.
template <class S, class E>
void reparam_run(const S* mu, const S* logvar, const E* eps, S* z, std::int64_t n, CascadeSum<acc_t<S>>* total) {
  using T = acc_t<S>;
  using V = Vec<T>;
  V term;
  const auto step = [&](V m, V lv, V e) {
    V sigma, variance_m1, excess;
    sigma_terms(lv, &sigma, &variance_m1, &excess);
    term = fma(m, m, excess);
    return fma(sigma, e, m);
  };
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    store(z + j, step(load(mu + j), load(logvar + j), load(eps + j)));
    total->add(term);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    store_n(z + j, step(load_n(mu + j, rest), load_n(logvar + j, rest), load_n(eps + j, rest)), rest);
    total->add(select(Mask<T>::first(rest), term, V(T(0))));
  }
}

// Calls run(piece, element, count, eps) over a range of pieces, eps being given noise or windows of made noise.
template <class Args, class S, class Run>
inline void with_noise(const Args& a, const Piece& piece, const S* noise, NoiseWindow<acc_t<S>>* window, Run run) {
  if (noise != nullptr) {
    run(piece.first, piece.last - piece.first, noise + piece.row * a.noise_stride + piece.first);
    return;
  }
  for (std::int64_t j = piece.first; j < piece.last;) {
    const std::int64_t index = piece.row * a.size + j;
    const std::int64_t n = std::min(piece.last - j, window->window_end(index) - index);
    run(j, n, window->at(index));
    j += n;
  }
}

// One past the last element of the pieces before `end`.
inline std::int64_t element_limit(std::int64_t end, std::int64_t size) {
  const Piece last(end - 1, size);
  return last.row * size + last.last;
}

template <class S>
void reparam_forward(const ReparamForward<S>& a, std::int64_t begin, std::int64_t end) {
  if (begin == end) return;
  NoiseWindow<acc_t<S>> window(a.key, element_limit(end, a.size));
  for (std::int64_t i = begin; i < end; ++i) {
    const Piece piece(i, a.size);
    const S* mu = a.mu + piece.row * a.mu_stride;
    const S* logvar = a.logvar + piece.row * a.logvar_stride;
    S* z = a.z + piece.row * a.size;
    CascadeSum<acc_t<S>> total;
    with_noise(a, piece, a.noise, &window, [&](std::int64_t j, std::int64_t n, const auto* eps) {
      reparam_run(mu + j, logvar + j, eps, z + j, n, &total);
    });
    a.partial[i] = acc_t<S>(0.5) * total.value();
  }
}

template <bool kNoiseGrad, class S, class E>
void reparam_grad_run(const S* grad_z, Vec<acc_t<S>> grad_kl, const S* mu, const S* logvar, const E* eps,
                      S* grad_mu, S* grad_logvar, S* grad_noise, std::int64_t n) {
  using T = acc_t<S>;
  using V = Vec<T>;
  V gm, gl, gn;
  const auto step = [&](V gz, V m, V lv, V e) {
    V sigma, variance_m1, excess;
    sigma_terms(lv, &sigma, &variance_m1, &excess);
    gn = gz * sigma;
    gm = fma(grad_kl, m, gz);
    gl = V(T(0.5)) * fma(gn, e, grad_kl * variance_m1);
  };
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    step(load(grad_z + j), load(mu + j), load(logvar + j), load(eps + j));
    store(grad_mu + j, gm);
    store(grad_logvar + j, gl);
    if constexpr (kNoiseGrad) store(grad_noise + j, gn);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    step(load_n(grad_z + j, rest), load_n(mu + j, rest), load_n(logvar + j, rest), load_n(eps + j, rest));
    store_n(grad_mu + j, gm, rest);
    store_n(grad_logvar + j, gl, rest);
    if constexpr (kNoiseGrad) store_n(grad_noise + j, gn, rest);
  }
}

template <bool kNoiseGrad, class S>
void reparam_backward_pieces(const ReparamBackward<S>& a, std::int64_t begin, std::int64_t end) {
  NoiseWindow<acc_t<S>> window(a.key, element_limit(end, a.size));
  for (std::int64_t i = begin; i < end; ++i) {
    const Piece piece(i, a.size);
    const S* grad_z = a.grad_z + piece.row * a.grad_z_stride;
    const S* mu = a.mu + piece.row * a.mu_stride;
    const S* logvar = a.logvar + piece.row * a.logvar_stride;
    const std::int64_t out = piece.row * a.size;
    const Vec<acc_t<S>> grad_kl(a.grad_kl[piece.row]);
    with_noise(a, piece, a.noise, &window, [&](std::int64_t j, std::int64_t n, const auto* eps) {
      reparam_grad_run<kNoiseGrad>(grad_z + j, grad_kl, mu + j, logvar + j, eps, a.grad_mu + out + j,
                                   a.grad_logvar + out + j, kNoiseGrad ? a.grad_noise + out + j : nullptr, n);
    });
  }
}

template <class S>
void reparam_backward(const ReparamBackward<S>& a, std::int64_t begin, std::int64_t end) {
  if (begin == end) return;
  a.grad_noise != nullptr ? reparam_backward_pieces<true>(a, begin, end)
                          : reparam_backward_pieces<false>(a, begin, end);
}

}  // namespace fastgen::FASTGEN_ISA_NS
