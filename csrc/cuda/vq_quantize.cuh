// The loss of vector quantization from the squared distances of the rows, and its gradient in x.
#pragma once

#include "carver.h"
#include "vq_pack.cuh"

namespace fastgen::vq {

constexpr int kLossThreads = 256;
constexpr std::int64_t kLossRows = 4096;

// The sum of values[first, last), first <= i < last, in an order that `last - first` decides. In thread 0.
__device__ inline double sum_block(const double* values, std::int64_t first, std::int64_t last) {
  FASTGEN_SHARED(double, of_warp, [kLossThreads / 32]);
  double sum = 0;
  for (std::int64_t i = first + threadIdx.x; i < last; i += kLossThreads) sum += values[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int w = 1; w < kLossThreads / 32 && threadIdx.x == 0; ++w) sum += of_warp[w];
  return sum;
}

static __global__ void sum_errors_kernel(const double* errors, std::int64_t rows, double* sums) {
  const std::int64_t first = blockIdx.x * kLossRows;
  const double sum = sum_block(errors, first, first + kLossRows < rows ? first + kLossRows : rows);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void loss_kernel(const double* sums, std::int64_t count, double factor, T* loss) {
  const double sum = sum_block(sums, 0, count);
  if (threadIdx.x == 0) *loss = static_cast<T>(factor * sum);
}

// loss = factor * sum of the errors of the rows. run: as in vq_chain.cuh.
template <class T, class Run>
void sum_loss(Run& run, const double* errors, std::int64_t rows, double factor, T* loss) {
  const std::int64_t blocks = (rows + kLossRows - 1) / kLossRows;
  double* sums = nullptr;
  carve(run, [&](Carver& carver) { sums = carver.take<double>(blocks); });
  if (blocks > 0) {
    run(sum_errors_kernel, dim3(static_cast<unsigned>(blocks)), kLossThreads, 0, errors, rows, sums);
  }
  run(loss_kernel<T>, dim3(1), kLossThreads, 0, static_cast<const double*>(sums), blocks, factor, loss);
}

template <class S>
struct GradRows {
  const S *grad, *x;  // heads x rows x D
  const S* codes;     // heads x K x D
  const std::int64_t* indices;
  std::int64_t total, rows, code_count;  // rows of all heads and of one; codes of one
  int size, lanes;                       // lanes that share a row: a power of two, at most a warp
  double factor;
  const acc_t<S>* grad_loss;
  S* out;
};

// out = grad + factor * grad_loss * (x - e), e the code of each row. Indices out of range end the kernel with an
// error.
template <class S>
__global__ void grad_rows_kernel(const GradRows<S> a) {
  using T = acc_t<S>;
  const int lane = threadIdx.x % a.lanes;
  const std::int64_t row = std::int64_t{blockIdx.x} * (blockDim.x / a.lanes) + threadIdx.x / a.lanes;
  if (row >= a.total) return;
  const std::int64_t index = a.indices[row];
  if (index < 0 || index >= a.code_count) __trap();
  const S* code = a.codes + (row / a.rows * a.code_count + index) * a.size;
  const T pull = static_cast<T>(a.factor * static_cast<double>(*a.grad_loss));
  for (int j = lane * 8; j < a.size; j += a.lanes * 8) {
    T grad[8], x[8], e[8];
    load_eight(a.grad + row * a.size, j, a.size, grad);
    load_eight(a.x + row * a.size, j, a.size, x);
    load_eight(code, j, a.size, e);
#pragma unroll
    for (int i = 0; i < 8; ++i) grad[i] = fma(pull, x[i] - e[i], grad[i]);
    S* out = a.out + row * a.size + j;
    if (j + 8 <= a.size && reinterpret_cast<std::uintptr_t>(out) % 16 == 0) {
      *reinterpret_cast<Vector<S, 8>*>(out) = narrow<S>(grad);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (j + i < a.size) narrow(grad[i], out + i);
    }
  }
}

template <class S, class Run>
void grad_rows(Run& run, GradRows<S> a) {
  if (a.total == 0 || a.size == 0) return;
  constexpr int kThreads = 256;
  for (a.lanes = 1; a.lanes * 8 < a.size && a.lanes < 32;) a.lanes *= 2;
  const std::int64_t each = kThreads / a.lanes;
  run(grad_rows_kernel<S>, dim3(static_cast<unsigned>((a.total + each - 1) / each)), kThreads, 0, a);
}

}  // namespace fastgen::vq
