// One sum, or one value, for each row of a (B, ...) tensor, whatever the length of the rows. Read once per
// instruction set by the kernels that need it, after simd.h.

namespace fastgen::FASTGEN_ISA_NS {

// Rows shorter than this are handled many at a time, up to kRowBlock elements: a vector of each would be mostly
// idle.
constexpr std::int64_t kShortRow = 64, kRowBlock = 1024;

// Where the terms of a sum go: added up at once, or kept for the sums of several rows. `at` counts from the first
// element of the piece; `rest` is the number of lanes that count.
template <class T>
struct AddUp {
  CascadeSum<T>* total;
  void operator()(std::int64_t, Vec<T> term) const { total->add(term); }
  void tail(std::int64_t, Vec<T> term, int rest) const {
    total->add(select(Mask<T>::first(rest), term, Vec<T>(T(0))));
  }
};
template <class T>
struct Keep {
  T* terms;
  void operator()(std::int64_t at, Vec<T> term) const { term.store(terms + at); }
  void tail(std::int64_t at, Vec<T> term, int) const { term.store(terms + at); }
};

// out[j] = scale times the sum of the j-th `size` values.
template <class T>
void sum_segments(const T* values, std::int64_t count, std::int64_t size, T scale, T* out) {
  using V = Vec<T>;
  for (std::int64_t j = 0; j < count; ++j, values += size) {
    if (size < V::width) {
      T total = T(0);
      for (std::int64_t i = 0; i < size; ++i) total += values[i];
      out[j] = scale * total;
      continue;
    }
    CascadeSum<T> total;
    std::int64_t i = 0;
    for (; i + V::width <= size; i += V::width) total.add(V::load(values + i));
    if (i < size) total.add(V::load_n(values + i, static_cast<int>(size - i)));
    out[j] = scale * total.value();
  }
}

// Pieces [begin, end) of rows of `size` elements: each(piece, sink) gives the terms of a piece to the sink, and
// their sum, times `scale`, is written to out[i]. `dense`: one row follows the other in memory, so each() may be
// given several at once, as one long piece of row 0.
template <class T, class F>
void each_row_sum(std::int64_t begin, std::int64_t end, std::int64_t size, bool dense, T scale, T* out, F each) {
  if (size >= kShortRow) {
    for (std::int64_t i = begin; i < end; ++i) {
      CascadeSum<T> total;
      each(Piece(i, size), AddUp<T>{&total});
      out[i] = scale * total.value();
    }
    return;
  }
  alignas(64) T terms[kRowBlock + Vec<T>::width];
  const std::int64_t rows_each = kRowBlock / std::max<std::int64_t>(1, size);
  for (std::int64_t row = begin; row < end; row += rows_each) {
    const std::int64_t rows = std::min(rows_each, end - row);
    if (dense) {
      each(Piece(0, row * size, (row + rows) * size), Keep<T>{terms});
    } else {
      for (std::int64_t r = 0; r < rows; ++r) each(Piece(row + r, 0, size), Keep<T>{terms + r * size});
    }
    sum_segments(terms, rows, size, scale, out + row);
  }
}

// The value of the row that an element belongs to: the same throughout a piece, or element by element.
template <class T>
struct SameValue {
  Vec<T> value;
  Vec<T> operator()(std::int64_t) const { return value; }
};
template <class T>
struct SpreadValues {
  const T* spread;
  Vec<T> operator()(std::int64_t at) const { return Vec<T>::load(spread + at); }
};

// The counterpart for gradients: each(piece, value), value(at) being that of values[] for the elements from `at`
// on.
template <class T, class F>
void each_row_value(std::int64_t begin, std::int64_t end, std::int64_t size, bool dense, const T* values, F each) {
  if (size >= kShortRow || !dense) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Piece piece(i, size);
      each(piece, SameValue<T>{Vec<T>(values[piece.row])});
    }
    return;
  }
  alignas(64) T spread[kRowBlock + Vec<T>::width] = {};
  const std::int64_t rows_each = kRowBlock / std::max<std::int64_t>(1, size);
  for (std::int64_t row = begin; row < end; row += rows_each) {
    const std::int64_t rows = std::min(rows_each, end - row);
    for (std::int64_t r = 0; r < rows; ++r) std::fill_n(spread + r * size, size, values[row + r]);
    each(Piece(0, row * size, (row + rows) * size), SpreadValues<T>{spread});
  }
}

}  // namespace fastgen::FASTGEN_ISA_NS
