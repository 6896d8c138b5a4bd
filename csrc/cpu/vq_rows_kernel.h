// Rows made dense and brought to the arithmetic type, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

template <class S>
void read_rows(const ReadRows<S>& a) {
  using T = acc_t<S>;
  const Tokens& t = *a.tokens;
  for (std::int64_t i = 0; i < a.count; ++i) {
    const S* row = a.x + t.offset(a.head, a.first + i);
    T* out = a.out + i * t.size;
    if (t.element_stride != 1) {
      for (std::int64_t j = 0; j < t.size; ++j) out[j] = static_cast<T>(row[j * t.element_stride]);
      continue;
    }
    std::int64_t j = 0;
    for (; j + Vec<T>::width <= t.size; j += Vec<T>::width) store(out + j, load(row + j));
    const int rest = static_cast<int>(t.size - j);
    if (rest > 0) store_n(out + j, load_n(row + j, rest), rest);
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
