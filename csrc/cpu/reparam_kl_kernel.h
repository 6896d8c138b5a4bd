// Gaussian reparameterisation and KL divergence over a range of pieces, for one instruction set.

#include "philox_simd.h"
#include "row_sums.h"

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

// n elements; eps has the type it is stored in. Gives mu^2 + exp(logvar) - 1 - logvar to the sink, from `at` on.
template <class S, class E, class Sink>
inline void reparam_run(const S* mu, const S* logvar, const E* eps, S* z, std::int64_t n, std::int64_t at,
                        const Sink& sink) {
  using T = acc_t<S>;
  using V = Vec<T>;
  V term;
  const auto step = [&](V m, V lv, V e) FASTGEN_INLINE_LAMBDA {
    V sigma, variance_m1, excess;
    sigma_terms(lv, &sigma, &variance_m1, &excess);
    term = fma(m, m, excess);
    return fma(sigma, e, m);
  };
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    store(z + j, step(load(mu + j), load(logvar + j), load(eps + j)));
    sink(at + j, term);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    store_n(z + j, step(load_n(mu + j, rest), load_n(logvar + j, rest), load_n(eps + j, rest)), rest);
    sink.tail(at + j, term, rest);
  }
}

// Calls run(element, count, eps) over a piece, eps being given noise or windows of made noise.
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
  using T = acc_t<S>;
  NoiseWindow<T> window(a.key, element_limit(end, a.size));
  each_row_sum(begin, end, a.size, a.dense, T(0.5), a.partial, [&](const Piece& piece, const auto& sink) {
    const S* mu = a.mu + piece.row * a.mu_stride;
    const S* logvar = a.logvar + piece.row * a.logvar_stride;
    S* z = a.z + piece.row * a.size;
    with_noise(a, piece, a.noise, &window, [&](std::int64_t j, std::int64_t n, const auto* eps) {
      reparam_run(mu + j, logvar + j, eps, z + j, n, j - piece.first, sink);
    });
  });
}

template <bool kNoiseGrad, class S, class E, class Value>
inline void reparam_grad_run(const S* grad_z, const Value& grad_kl, std::int64_t at, const S* mu, const S* logvar,
                             const E* eps, S* grad_mu, S* grad_logvar, S* grad_noise, std::int64_t n) {
  using T = acc_t<S>;
  using V = Vec<T>;
  V gm, gl, gn;
  const auto step = [&](V gz, V gk, V m, V lv, V e) FASTGEN_INLINE_LAMBDA {
    V sigma, variance_m1, excess;
    sigma_terms(lv, &sigma, &variance_m1, &excess);
    gn = gz * sigma;
    gm = fma(gk, m, gz);
    gl = V(T(0.5)) * fma(gn, e, gk * variance_m1);
  };
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) {
    step(load(grad_z + j), grad_kl(at + j), load(mu + j), load(logvar + j), load(eps + j));
    store(grad_mu + j, gm);
    store(grad_logvar + j, gl);
    if constexpr (kNoiseGrad) store(grad_noise + j, gn);
  }
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    step(load_n(grad_z + j, rest), grad_kl(at + j), load_n(mu + j, rest), load_n(logvar + j, rest),
         load_n(eps + j, rest));
    store_n(grad_mu + j, gm, rest);
    store_n(grad_logvar + j, gl, rest);
    if constexpr (kNoiseGrad) store_n(grad_noise + j, gn, rest);
  }
}

template <bool kNoiseGrad, class S>
void reparam_backward_pieces(const ReparamBackward<S>& a, std::int64_t begin, std::int64_t end) {
  NoiseWindow<acc_t<S>> window(a.key, element_limit(end, a.size));
  each_row_value(begin, end, a.size, a.dense, a.grad_kl, [&](const Piece& piece, const auto& grad_kl) {
    const S* grad_z = a.grad_z + piece.row * a.grad_z_stride;
    const S* mu = a.mu + piece.row * a.mu_stride;
    const S* logvar = a.logvar + piece.row * a.logvar_stride;
    const std::int64_t out = piece.row * a.size;
    with_noise(a, piece, a.noise, &window, [&](std::int64_t j, std::int64_t n, const auto* eps) {
      reparam_grad_run<kNoiseGrad>(grad_z + j, grad_kl, j - piece.first, mu + j, logvar + j, eps,
                                   a.grad_mu + out + j, a.grad_logvar + out + j,
                                   kNoiseGrad ? a.grad_noise + out + j : nullptr, n);
    });
  });
}

template <class S>
void reparam_backward(const ReparamBackward<S>& a, std::int64_t begin, std::int64_t end) {
  if (begin == end) return;
  a.grad_noise != nullptr ? reparam_backward_pieces<true>(a, begin, end)
                          : reparam_backward_pieces<false>(a, begin, end);
}

}  // namespace fastgen::FASTGEN_ISA_NS
