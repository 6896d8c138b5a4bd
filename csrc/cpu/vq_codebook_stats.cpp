// Sums of rows by code on the CPU: a stable counting sort of the rows by code, then every code's rows in row
// order.

#include <stdexcept>

#include "vq.h"

namespace fastgen {

template <class S, class O>
struct SumByCode {
  const Tokens* x;
  const std::int64_t *order, *offsets;  // rows sorted by code; where each code begins in them, and their end
  std::int64_t codebook_size;
  const acc_t<S>* codes;  // may be null
  double scale;
  O* out;
  acc_t<S>* counts;  // may be null
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "vq_codebook_stats_kernel.h"
#include "foreach_isa.h"

namespace fastgen {

void check_indices(const std::int64_t* indices, std::int64_t count, std::int64_t codebook_size) {
  for (std::int64_t n = 0; n < count; ++n) {
    if (indices[n] >= 0 && indices[n] < codebook_size) continue;
    throw std::invalid_argument("indices: expected values in [0, " + std::to_string(codebook_size) + "), got " +
                                std::to_string(indices[n]));
  }
}

template <class S, class O>
void sum_by_code(const Tokens& x, const std::int64_t* indices, std::int64_t codebook_size, const acc_t<S>* codes,
                 double scale, O* out, acc_t<S>* counts) {
  const std::int64_t total = x.heads * x.rows, code_count = x.heads * codebook_size;
  std::vector<std::int64_t> offsets(code_count + 1), order(total);
  check_indices(indices, total, codebook_size);
  for (std::int64_t h = 0; h < x.heads; ++h) {
    for (std::int64_t r = 0; r < x.rows; ++r) ++offsets[h * codebook_size + indices[h * x.rows + r] + 1];
  }
  for (std::int64_t c = 0; c < code_count; ++c) offsets[c + 1] += offsets[c];
  std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);
  for (std::int64_t h = 0; h < x.heads; ++h) {
    for (std::int64_t r = 0; r < x.rows; ++r) order[next[h * codebook_size + indices[h * x.rows + r]]++] = r;
  }

  const SumByCode<S, O> args{&x, order.data(), offsets.data(), codebook_size, codes, scale, out, counts};
  // Shares of about as many rows each: codes are used unequally. Codes belong to the share their first row is in.
  const std::int64_t share = std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, x.size));
  torch::stable::parallel_for(0, total / share + 1, 1, [&](std::int64_t begin, std::int64_t end) {
    const auto first = std::lower_bound(offsets.begin(), offsets.end() - 1, begin * share);
    const auto last = std::lower_bound(offsets.begin(), offsets.end() - 1, end * share);
    FASTGEN_DISPATCH_ISA(sum_by_code, args, first - offsets.begin(), last - offsets.begin());
  });
}

#define FASTGEN_SUM_BY_CODE(S, O)                                                                                 \
  template void sum_by_code<S, O>(const Tokens&, const std::int64_t*, std::int64_t, const acc_t<S>*, double, O*,  \
                                  acc_t<S>*);
FASTGEN_SUM_BY_CODE(float, float)
FASTGEN_SUM_BY_CODE(double, double)
FASTGEN_SUM_BY_CODE(Half, Half)
FASTGEN_SUM_BY_CODE(BFloat16, BFloat16)
FASTGEN_SUM_BY_CODE(Half, float)
FASTGEN_SUM_BY_CODE(BFloat16, float)
#undef FASTGEN_SUM_BY_CODE

namespace {

std::tuple<Tensor, Tensor> vq_codebook_stats_fwd(const Tensor& x, const Tensor& indices,
                                                 std::int64_t codebook_size) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && codebook_size >= 1,
                  "vq_codebook_stats: expected x (..., D) and at least one code");
  std::vector<std::int64_t> shape = sizes(x);
  shape.pop_back();
  check_shape(indices, shape, ScalarType::Long, "vq_codebook_stats: indices");
  const ScalarType type = acc_type(x.scalar_type());
  Tensor counts = new_empty(x, {codebook_size}, type);
  Tensor sums = new_empty(x, {codebook_size, x.size(x.dim() - 1)}, type);
  const Tensor dense = as_contiguous(indices);
  const Tokens tokens(x, false);
  dispatch_dtype(x.scalar_type(), "vq_codebook_stats", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    using T = acc_t<S>;
    sum_by_code<S, T>(tokens, data<std::int64_t>(dense), codebook_size, nullptr, 1, data<T>(sums),
                      data<T>(counts));
  });
  return {counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("vq_codebook_stats_fwd", TORCH_BOX(&vq_codebook_stats_fwd)); }

}  // namespace fastgen
