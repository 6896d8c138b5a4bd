// Sums of rows over a range of codes, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

template <class S, class O>
void sum_by_code(const SumByCode<S, O>& a, std::int64_t first, std::int64_t last) {
  using T = acc_t<S>;
  // Columns a turn: their float64 sums stay in registers or L1.
  constexpr std::int64_t kColumns = 256;
  constexpr std::int64_t kAhead = 4, kLine = 64 / sizeof(S);
  const Tokens& x = *a.x;
  const S* base = data<S>(x.tensor);
  double total[kColumns];
  for (std::int64_t c = first; c < last; ++c) {
    const std::int64_t begin = a.offsets[c], end = a.offsets[c + 1], head = c / a.codebook_size;
    if (a.counts != nullptr) a.counts[c] = static_cast<T>(end - begin);
    for (std::int64_t column = 0; column < x.size; column += kColumns) {
      const std::int64_t n = std::min(kColumns, x.size - column);
      const T* code = a.codes == nullptr ? nullptr : a.codes + c * x.size + column;
      std::fill_n(total, n, 0.0);
      for (std::int64_t i = begin; i < end; ++i) {
        const S* row = base + x.offset(head, a.order[i]) + column * x.element_stride;
        // The rows of a code lie anywhere, and nothing but this list tells where.
        if (i + kAhead < end) {
          const S* later = base + x.offset(head, a.order[i + kAhead]) + column * x.element_stride;
          for (std::int64_t j = 0; j < n; j += kLine) __builtin_prefetch(later + j);
        }
        if (x.element_stride != 1) {
          for (std::int64_t j = 0; j < n; ++j) total[j] += static_cast<double>(row[j * x.element_stride]);
        } else {
          for (std::int64_t j = 0; j < n; ++j) total[j] += static_cast<double>(row[j]);
        }
        if (code == nullptr) continue;
        for (std::int64_t j = 0; j < n; ++j) total[j] -= static_cast<double>(code[j]);
      }
      O* out = a.out + c * x.size + column;
      for (std::int64_t j = 0; j < n; ++j) out[j] = static_cast<O>(static_cast<T>(a.scale * total[j]));
    }
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
