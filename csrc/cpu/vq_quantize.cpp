// Vector quantization on the CPU: search, gather and loss in one pass over the rows; the gradient in one more, and
// one over the rows of each code.

#include "vq.h"

namespace fastgen {

template <class S>
struct GatherCodes {
  const FoundRows<acc_t<S>>* found;
  S* quantized;   // of the first row
  double* error;  // sum of squared differences
};

template <class S>
struct QuantizeBackward {
  const acc_t<S>*grad, *rows;
  const std::int64_t* indices;
  const acc_t<S>* codes;
  std::int64_t count, size;
  double pull;  // gradient of the loss by x - e
  S* grad_x;
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "vq_quantize_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

std::tuple<Tensor, Tensor, Tensor> vq_quantize_fwd(const Tensor& x, const Tensor& codebook,
                                                   double commitment_weight, double codebook_weight) {
  check_codebook(x, codebook, "vq_quantize");
  std::vector<std::int64_t> shape = sizes(x);
  shape.pop_back();
  Tensor quantized = empty_contiguous(x);
  Tensor indices = new_empty(x, shape, ScalarType::Long);
  Tensor loss = new_empty(x, {}, acc_type(x.scalar_type()));
  dispatch_dtype(x.scalar_type(), "vq_quantize", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    using T = acc_t<S>;
    const Codebook<T> codes(codebook);
    const Tokens rows(x, codebook.dim() == 3);
    std::vector<double> errors(block_count(rows));
    S* out = data<S>(quantized);
    vq_search<T>(rows, codes, false, data<std::int64_t>(indices), nullptr,
                 [&](const FoundRows<T>& found, std::int64_t block) {
                   const GatherCodes<S> args{&found, out + found.first * found.size, &errors[block]};
                   FASTGEN_DISPATCH_ISA(gather_codes, args);
                 });
    double error = 0;
    for (const double e : errors) error += e;
    const double count = static_cast<double>(std::max<std::int64_t>(1, x.numel()));
    *data<T>(loss) = static_cast<T>((codebook_weight + commitment_weight) * error / count);
  });
  return {quantized, indices, loss};
}

template <class S>
void grad_rows(const Tokens& grads, const Tokens& x, const Codebook<acc_t<S>>& codes, const std::int64_t* indices,
               double pull, S* out) {
  using T = acc_t<S>;
  const std::int64_t step = block_rows(x.rows), blocks = (x.rows + step - 1) / step;
  torch::stable::parallel_for(0, x.heads * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<T> grad(step * x.size), rows(step * x.size);
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t head = b / blocks, first = b % blocks * step, count = std::min(step, x.rows - first);
      const std::int64_t row = head * x.rows + first;
      const QuantizeBackward<S> args{dense_rows<S>(grads, head, first, count, grad.data()),
                                     dense_rows<S>(x, head, first, count, rows.data()),
                                     indices + row,
                                     codes.head(head),
                                     count,
                                     x.size,
                                     pull,
                                     out + row * x.size};
      FASTGEN_DISPATCH_ISA(quantize_backward, args);
    }
  });
}

std::tuple<Tensor, Tensor> vq_quantize_bwd(const Tensor& grad_quantized, const Tensor& grad_loss, const Tensor& x,
                                           const Tensor& codebook, const Tensor& indices, double commitment_weight,
                                           double codebook_weight, bool codebook_grad) {
  check_codebook(x, codebook, "vq_quantize");
  check_like(grad_quantized, x, "vq_quantize: grad_quantized");
  check_shape(grad_loss, {}, acc_type(x.scalar_type()), "vq_quantize: grad_loss");
  std::vector<std::int64_t> shape = sizes(x);
  shape.pop_back();
  check_shape(indices, shape, ScalarType::Long, "vq_quantize: indices");
  const Tensor dense = as_contiguous(indices);
  const std::int64_t* index = data<std::int64_t>(dense);
  Tensor grad_x = empty_contiguous(x);
  Tensor grad_codebook =
      codebook_grad ? empty_contiguous(codebook) : new_empty(codebook, {0}, codebook.scalar_type());
  dispatch_dtype(x.scalar_type(), "vq_quantize", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    using T = acc_t<S>;
    const Codebook<T> codes(codebook);
    const bool heads = codebook.dim() == 3;
    const Tokens rows(x, heads), grads(grad_quantized, heads);
    const double count = static_cast<double>(std::max<std::int64_t>(1, x.numel()));
    const double scale = 2 * static_cast<double>(*data<T>(grad_loss)) / count;
    check_indices(index, dense.numel(), codes.count);
    grad_rows<S>(grads, rows, codes, index, commitment_weight * scale, data<S>(grad_x));
    if (!codebook_grad) return;
    sum_by_code<S, S>(rows, index, codes.count, codes.head(0), -codebook_weight * scale, data<S>(grad_codebook),
                      nullptr);
  });
  return {grad_x, grad_codebook};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("vq_quantize_fwd", TORCH_BOX(&vq_quantize_fwd));
  m.impl("vq_quantize_bwd", TORCH_BOX(&vq_quantize_bwd));
}

}  // namespace fastgen
