// Gather and loss, and the gradient of vector quantization, over one block of rows, for one instruction set.

namespace fastgen::FASTGEN_ISA_NS {

// f(j, n) over vectors of a row: n elements from j.
template <class T, class F>
inline void each_vector(std::int64_t size, F&& f) {
  std::int64_t j = 0;
  for (; j + Vec<T>::width <= size; j += Vec<T>::width) f(j, Vec<T>::width);
  if (j < size) f(j, static_cast<int>(size - j));
}

template <class S>
void gather_codes(const GatherCodes<S>& a) {
  using T = acc_t<S>;
  const FoundRows<T>& found = *a.found;
  double error = 0;
  for (std::int64_t i = 0; i < found.count; ++i) {
    const T* row = found.rows + i * found.size;
    const T* code = found.codes + found.indices[i] * found.size;
    S* out = a.quantized + i * found.size;
    CascadeSum<T> squares;
    each_vector<T>(found.size, [&](std::int64_t j, int n) {
      const Vec<T> x = load_lanes(row + j, n), e = load_lanes(code + j, n), difference = x - e;
      // x - x is zero, or NaN where x is not finite.
      store_lanes(out + j, e + (x - x), n);
      squares.add(difference * difference);
    });
    error += static_cast<double>(squares.value());
  }
  *a.error = error;
}

template <class S>
void quantize_backward(const QuantizeBackward<S>& a) {
  using T = acc_t<S>;
  const Vec<T> pull(static_cast<T>(a.pull));
  for (std::int64_t i = 0; i < a.count; ++i) {
    const std::int64_t at = i * a.size;
    const T* code = a.codes + a.indices[i] * a.size;
    each_vector<T>(a.size, [&](std::int64_t j, int n) {
      const Vec<T> difference = load_lanes(a.rows + at + j, n) - load_lanes(code + j, n);
      store_lanes(a.grad_x + at + j, fma(pull, difference, load_lanes(a.grad + at + j, n)), n);
    });
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
