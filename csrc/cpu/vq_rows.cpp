// The rows and codes that the quantization ops read, wherever they lie.

#include "vq.h"

namespace fastgen {

template <class S>
struct ReadRows {
  const S* x;
  const Tokens* tokens;
  std::int64_t head, first, count;
  acc_t<S>* out;
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "vq_rows_kernel.h"
#include "foreach_isa.h"

namespace fastgen {

Tokens::Tokens(const Tensor& x, bool with_heads) : tensor(x), heads(1), head_stride(0) {
  for (bool copied = false;; copied = true) {
    const std::int64_t last = tensor.dim() - 1;
    std::vector<std::int64_t> counts, strides;
    for (std::int64_t d = with_heads ? 1 : 0; d < last; ++d) {
      if (tensor.size(d) == 1) continue;
      if (!counts.empty() && strides.back() == tensor.stride(d) * tensor.size(d)) {
        counts.back() *= tensor.size(d);
        strides.back() = tensor.stride(d);
      } else {
        counts.push_back(tensor.size(d));
        strides.push_back(tensor.stride(d));
      }
    }
    if (counts.size() > 2 && !copied) {
      tensor = torch::stable::contiguous(x);
      continue;
    }
    counts.resize(2, 1);
    strides.resize(2, 0);
    if (counts[1] == 1) {
      std::swap(counts[0], counts[1]);
      std::swap(strides[0], strides[1]);
    }
    size = tensor.size(last);
    if (with_heads) {
      heads = tensor.size(0);
      head_stride = tensor.stride(0);
    }
    rows = counts[0] * counts[1];
    outer_stride = strides[0];
    inner = std::max<std::int64_t>(1, counts[1]);
    inner_stride = strides[1];
    element_stride = tensor.stride(last);
    return;
  }
}

template <class T>
Codebook<T>::Codebook(const Tensor& codebook)
    : tensor(torch::stable::contiguous(codebook)),
      heads(codebook.dim() == 3 ? codebook.size(0) : 1),
      count(codebook.size(codebook.dim() - 2)),
      size(codebook.size(codebook.dim() - 1)) {
  const ScalarType type = acc_type(codebook.scalar_type());
  if (codebook.scalar_type() == type) return;
  const Tensor given = tensor;
  tensor = new_empty(given, sizes(given), type);
  dispatch_dtype(given.scalar_type(), "vq: codebook", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    std::copy_n(data<S>(given), given.numel(), data<T>(tensor));
  });
}
template struct Codebook<float>;
template struct Codebook<double>;

template <class S>
const acc_t<S>* dense_rows(const Tokens& tokens, std::int64_t head, std::int64_t first, std::int64_t count,
                           acc_t<S>* buffer) {
  const S* x = data<S>(tokens.tensor);
  if constexpr (std::is_same_v<S, acc_t<S>>) {
    if (tokens.dense()) return x + tokens.offset(head, first);
  }
  const ReadRows<S> args{x, &tokens, head, first, count, buffer};
  FASTGEN_DISPATCH_ISA(read_rows, args);
  return buffer;
}
#define FASTGEN_DENSE_ROWS(S)                                                                                     \
  template const acc_t<S>* dense_rows<S>(const Tokens&, std::int64_t, std::int64_t, std::int64_t, acc_t<S>*);
FASTGEN_DENSE_ROWS(float)
FASTGEN_DENSE_ROWS(double)
FASTGEN_DENSE_ROWS(Half)
FASTGEN_DENSE_ROWS(BFloat16)
#undef FASTGEN_DENSE_ROWS

std::int64_t block_rows(std::int64_t rows) {
  const std::int64_t sixteenth = (rows + 15) / 16;
  return std::clamp<std::int64_t>(whole_tiles(sixteenth), kMaxTileRows, kBlockRows);
}

std::int64_t block_count(const Tokens& x) {
  const std::int64_t step = block_rows(x.rows);
  return x.heads * ((x.rows + step - 1) / step);
}

void check_codebook(const Tensor& x, const Tensor& codebook, const char* op) {
  const std::int64_t dims = codebook.dim();
  STD_TORCH_CHECK(x.is_cpu() && codebook.is_cpu() && x.scalar_type() == codebook.scalar_type(), op,
                  ": codebook must have the device and dtype of x");
  STD_TORCH_CHECK(x.dim() >= 1 && (dims == 2 || (dims == 3 && x.dim() == 3 && x.size(0) == codebook.size(0))), op,
                  ": codebook must be (K, D), or (H, K, D) for x (H, N, D)");
  STD_TORCH_CHECK(codebook.size(dims - 1) == x.size(x.dim() - 1), op,
                  ": codebook must have vectors of the size of x's");
  STD_TORCH_CHECK(codebook.size(dims - 2) > 0, op, ": codebook must have at least one code");
}

}  // namespace fastgen
