// Gaussian reparameterisation and KL divergence, forward and gradient in one pass each. Noise is given, or made
// from a key in registers, again in the gradient.
#pragma once

#include <type_traits>

#include "noise.cuh"
#include "rows.cuh"

namespace fastgen {

// z = mu + sigma eps; kl[row] = 1/2 sum(mu^2 + exp(logvar) - 1 - logvar).
template <class S>
struct ReparamForward {
  const S *mu, *logvar, *noise;
  std::int64_t mu_stride, logvar_stride, noise_stride, rows, size;
  const std::int64_t* key;  // null: noise is given (whose own address is null where it is empty)
  S* z;
  acc_t<S>* kl;
};

template <class S>
struct ReparamBackward {
  const S* grad_z;
  const acc_t<S>* grad_kl;
  const S *mu, *logvar, *noise;
  std::int64_t grad_z_stride, mu_stride, logvar_stride, noise_stride, rows, size;
  const std::int64_t* key;
  S *grad_mu, *grad_logvar, *grad_noise;  // grad_noise null: not wanted
};

// With x = logvar / 2: sigma = exp(x), m = sigma - 1 and excess = m - x. Then exp(logvar) - 1 = m (m + 2), and
// exp(logvar) - 1 - logvar = m^2 + 2 excess.
template <class T>
struct SigmaTerms {
  T sigma, m, excess;
};

// Near zero m and its excess come from x^2 p(x), so that nothing cancels; p is fitted to a relative error of 8e-7
// for half and bfloat16, else of 1e-8.
template <class S>
__device__ __forceinline__ SigmaTerms<float> sigma_terms(float logvar) {
  const float x = 0.5f * logvar;
  float p, sigma;
  if constexpr (sizeof(S) == 2) {
    sigma = ex2_approx(logvar * 0.72134752044448170f);
    p = fmaf(fmaf(1.3914653100073338e-3f, x, 8.39541107416153e-3f), x, 4.1667476296424866e-2f);
    p = fmaf(fmaf(p, x, 1.6666279733181e-1f), x, 0.5f);
  } else {
    sigma = expf(x);
    p = fmaf(fmaf(1.9858127050e-4f, x, 1.3934486778e-3f), x, 8.3333617077e-3f);
    p = fmaf(fmaf(fmaf(p, x, 4.1666459292e-2f), x, 1.6666667163e-1f), x, 0.5f);
  }
  const bool near = fabsf(x) < (sizeof(S) == 2 ? 0.5f : 0.35f);
  const float m = near ? fmaf(p, x * x, x) : sigma - 1.0f;
  return {sigma, m, near ? p * (x * x) : m - x};
}

template <class S>
__device__ __forceinline__ SigmaTerms<double> sigma_terms(double logvar) {
  const double m = expm1(0.5 * logvar);
  return {exp(0.5 * logvar), m, m - 0.5 * logvar};
}

// The noise of a vector of elements from `index`, a multiple of 4 in the whole tensor: made, or `given`.
template <class S, bool kMakesNoise, int kCount>
__device__ __forceinline__ void noise_values(PhiloxKey key, std::int64_t index, const Vector<S, kCount>& given,
                                             acc_t<S> (&eps)[kCount]) {
  if constexpr (kMakesNoise) {
    make_noise<S>(key, static_cast<std::uint64_t>(index) / 4, eps);
  } else {
    widen(given, eps);
  }
}

template <class S, bool kMakesNoise, bool kVectors, bool kShortRows>
__global__ void __launch_bounds__(kBlockThreads)
    reparam_forward_kernel(ReparamForward<S> a, unsigned pieces, acc_t<S>* kl_of_pieces) {
  using T = acc_t<S>;
  constexpr int kCount = kRowVector<S, kVectors>, kInputs = kMakesNoise ? 2 : 3;
  const Team<kShortRows> team(a.rows, a.size, pieces);
  const PhiloxKey key = kMakesNoise ? load_key(a.key) : PhiloxKey{0, 0};
  const S* const rows[3] = {a.mu + team.row * a.mu_stride, a.logvar + team.row * a.logvar_stride,
                            a.noise + team.row * a.noise_stride};
  const std::int64_t start = team.row * a.size;
  T squares = 0, excess = 0;
  for_each_vector<S, kVectors, kInputs>(team, a.size, rows, [&](std::int64_t j, const auto& in) {
    T mu[kCount], logvar[kCount], eps[kCount], z[kCount];
    widen(in[0], mu);
    widen(in[1], logvar);
    noise_values<S, kMakesNoise>(key, start + j, in[kInputs - 1], eps);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const SigmaTerms<T> terms = sigma_terms<S>(logvar[i]);
      z[i] = fma(terms.sigma, eps[i], mu[i]);
      squares = fma(mu[i], mu[i], fma(terms.m, terms.m, squares));
      excess += terms.excess;
    }
    write_vector<kVectors>(z, a.z + start + j, team.first - j, team.last - j);
  });
  const T kl = team.sum(fma(T(0.5), squares, excess));
  if (team.rank == 0 && team.row < a.rows) {
    kl_of_pieces[team.row * pieces + team.first / kPiece] = kl;
  }
}

// Three blocks to a multiprocessor leave a thread 80 registers. Doubles, masks of single elements and the vectors
// of given noise would spill there.
template <class S, bool kMakesNoise, bool kVectors, bool kShortRows>
__global__ void __launch_bounds__(kBlockThreads, (kMakesNoise && kVectors) ? 3 : 1)
    reparam_backward_kernel(ReparamBackward<S> a, unsigned pieces) {
  using T = acc_t<S>;
  constexpr int kCount = kRowVector<S, kVectors>, kInputs = kMakesNoise ? 3 : 4;
  const Team<kShortRows> team(a.rows, a.size, pieces);
  const PhiloxKey key = kMakesNoise ? load_key(a.key) : PhiloxKey{0, 0};
  const S* const rows[4] = {a.grad_z + team.row * a.grad_z_stride, a.mu + team.row * a.mu_stride,
                            a.logvar + team.row * a.logvar_stride, a.noise + team.row * a.noise_stride};
  const std::int64_t start = team.row * a.size;
  const T grad_kl = team.row < a.rows ? a.grad_kl[team.row] : T(0), half_grad_kl = T(0.5) * grad_kl;
  for_each_vector<S, kVectors, kInputs>(team, a.size, rows, [&](std::int64_t j, const auto& in) {
    T grad_z[kCount], mu[kCount], logvar[kCount], eps[kCount];
    widen(in[0], grad_z);
    widen(in[1], mu);
    widen(in[2], logvar);
    noise_values<S, kMakesNoise>(key, start + j, in[kInputs - 1], eps);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const SigmaTerms<T> terms = sigma_terms<S>(logvar[i]);
      mu[i] = fma(grad_kl, mu[i], grad_z[i]);
      grad_z[i] *= terms.sigma;
      logvar[i] = fma(half_grad_kl * terms.m, terms.m + T(2), T(0.5) * grad_z[i] * eps[i]);
    }
    write_vector<kVectors>(mu, a.grad_mu + start + j, team.first - j, team.last - j);
    write_vector<kVectors>(logvar, a.grad_logvar + start + j, team.first - j, team.last - j);
    if (!kMakesNoise && a.grad_noise != nullptr) {
      write_vector<kVectors>(grad_z, a.grad_noise + start + j, team.first - j, team.last - j);
    }
  });
}

// Calls f(makes noise, whole vectors, short rows) with constants for the three. Doubles are never taken as
// vectors: they are there to check gradients, and their kernels take the longest to compile.
template <class S, class F>
void with_constants(bool makes_noise, bool vectors, bool short_rows, F f) {
  const auto third = [&](auto a, auto b) { short_rows ? f(a, b, std::true_type()) : f(a, b, std::false_type()); };
  const auto second = [&](auto a) {
    if constexpr (sizeof(S) < sizeof(double)) {
      if (vectors) return third(a, std::true_type());
    }
    third(a, std::false_type());
  };
  makes_noise ? second(std::true_type()) : second(std::false_type());
}

// run(kernel, grid, threads, bytes of shared memory, arguments...) starts a kernel; run.allocate(bytes) gives
// memory.
template <class S, class Run>
void reparam_forward(const ReparamForward<S>& a, Run& run) {
  if (a.rows == 0) return;
  const RowGrid grid(a.rows, a.size);
  const bool vectors = a.size % kVector<S> == 0 && vectors_at(a.mu, a.mu_stride) &&
                       vectors_at(a.logvar, a.logvar_stride) && vectors_at(a.noise, a.noise_stride);
  acc_t<S>* kl = a.kl;
  if (grid.pieces > 1) kl = static_cast<acc_t<S>*>(run.allocate(grid.rows * grid.pieces * sizeof(acc_t<S>)));
  with_constants<S>(a.key != nullptr, vectors, grid.short_rows, [&](auto makes, auto whole, auto short_rows) {
    run(reparam_forward_kernel<S, makes(), whole(), short_rows()>, grid.blocks(), grid.threads, 0, a,
        static_cast<unsigned>(grid.pieces), kl);
  });
  if (grid.pieces > 1) sum_pieces(kl, grid, a.kl, run);
}

template <class S, class Run>
void reparam_backward(const ReparamBackward<S>& a, Run& run) {
  if (a.rows == 0) return;
  const RowGrid grid(a.rows, a.size);
  const bool vectors = a.size % kVector<S> == 0 && vectors_at(a.grad_z, a.grad_z_stride) &&
                       vectors_at(a.mu, a.mu_stride) && vectors_at(a.logvar, a.logvar_stride) &&
                       vectors_at(a.noise, a.noise_stride);
  with_constants<S>(a.key != nullptr, vectors, grid.short_rows, [&](auto makes, auto whole, auto short_rows) {
    run(reparam_backward_kernel<S, makes(), whole(), short_rows()>, grid.blocks(), grid.threads, 0, a,
        static_cast<unsigned>(grid.pieces));
  });
}

}  // namespace fastgen
