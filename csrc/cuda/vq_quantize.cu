// Vector quantization on the GPU: the search writes the codes of the rows and their distances as it settles each
// row; the gradient is one more pass over the rows, and one over the rows of each code.

#include <tuple>

#include "arguments.h"
#include "sum_by_code.cuh"
#include "vq_quantize.cuh"
#include "vq_search.h"

namespace fastgen {
namespace {

double element_count(const Tensor& x) { return static_cast<double>(std::max<std::int64_t>(1, x.numel())); }

std::tuple<Tensor, Tensor, Tensor> vq_quantize_fwd(const Tensor& x, const Tensor& codebook,
                                                   double commitment_weight, double codebook_weight) {
  vq::check_codebook(x, codebook, "vq_quantize");
  std::vector<std::int64_t> shape = sizes(x);
  Run run(x);
  Tensor quantized = torch::stable::new_empty(x, shape);
  shape.pop_back();
  Tensor indices = torch::stable::new_empty(x, shape, ScalarType::Long);
  Tensor loss = torch::stable::new_empty(x, {}, acc_type(x.scalar_type()));
  const Tensor rows = torch::stable::contiguous(x), codes = torch::stable::contiguous(codebook);
  const vq::Sizes sizes = vq::sizes_of(x, codebook);
  dispatch_dtype(x.scalar_type(), "vq_quantize", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    using T = acc_t<S>;
    double* errors = nullptr;
    carve(run, [&](Carver& carver) { errors = carver.take<double>(sizes.heads * sizes.rows); });
    vq::search_on_gpu<S>(run, data<const S>(rows), data<const S>(codes), sizes, false,
                         {data<std::int64_t>(indices), nullptr, data<S>(quantized), errors});
    const double factor = (codebook_weight + commitment_weight) / element_count(x);
    vq::sum_loss(run, errors, sizes.heads * sizes.rows, factor, data<T>(loss));
  });
  return {quantized, indices, loss};
}

std::tuple<Tensor, Tensor> vq_quantize_bwd(const Tensor& grad_quantized, const Tensor& grad_loss, const Tensor& x,
                                           const Tensor& codebook, const Tensor& indices, double commitment_weight,
                                           double codebook_weight, bool codebook_grad) {
  vq::check_codebook(x, codebook, "vq_quantize");
  check_like(grad_quantized, x, "vq_quantize: grad_quantized");
  check_shape(grad_loss, x, {}, acc_type(x.scalar_type()), "vq_quantize: grad_loss");
  std::vector<std::int64_t> shape = sizes(x);
  Run run(x);
  Tensor grad_x = torch::stable::new_empty(x, shape);
  shape.pop_back();
  check_shape(indices, x, shape, ScalarType::Long, "vq_quantize: indices");
  Tensor grad_codebook =
      torch::stable::new_empty(codebook, codebook_grad ? sizes(codebook) : std::vector<std::int64_t>{0});
  const Tensor rows = torch::stable::contiguous(x), codes = torch::stable::contiguous(codebook);
  const Tensor grads = torch::stable::contiguous(grad_quantized), dense = torch::stable::contiguous(indices);
  const vq::Sizes sizes = vq::sizes_of(x, codebook);
  STD_TORCH_CHECK(sizes.heads * sizes.rows <= std::numeric_limits<std::int32_t>::max() &&
                      sizes.heads * sizes.codes < std::numeric_limits<std::int32_t>::max(),
                  "vq_quantize: more than 2^31 rows or codes");
  dispatch_dtype(x.scalar_type(), "vq_quantize", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    using T = acc_t<S>;
    const double scale = 2 / element_count(x);
    const auto* index = data<const std::int64_t>(dense);
    const int size = static_cast<int>(sizes.size);
    vq::grad_rows(run, vq::GradRows<S>{data<const S>(grads), data<const S>(rows), data<const S>(codes), index,
                                       sizes.heads * sizes.rows, sizes.rows, sizes.codes, size, 1,
                                       commitment_weight * scale, data<const T>(grad_loss), data<S>(grad_x)});
    if (!codebook_grad) return;
    vq::SumByCode<S, S> a{};
    a.x = data<const S>(rows);
    a.codes = data<const S>(codes);
    a.factor = -codebook_weight * scale;
    a.scale = data<const T>(grad_loss);
    a.size = size;
    a.out = data<S>(grad_codebook);
    vq::sum_by_code(run, index, sizes.heads, sizes.rows, sizes.codes, a);
  });
  return {grad_x, grad_codebook};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) {
  m.impl("vq_quantize_fwd", TORCH_BOX(&vq_quantize_fwd));
  m.impl("vq_quantize_bwd", TORCH_BOX(&vq_quantize_bwd));
}

}  // namespace fastgen
